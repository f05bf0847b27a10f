// ---- a method's colour and marker: those of all figures ----------------------------------------------------------------

function marker(row, x, y, size) {
  const look = (name) => data.looks.methods[name];
  const colour = (name) => (look(name)[0] === "ink" ? "currentColor" : data.looks.colours[look(name)[0]]);
  const [first, last] = [row.methods[0], row.methods.at(-1)];
  const shade = (name) => (look(name)[0] === "grey" ? "marker grey" : "marker");
  return [svg("path", { class: shade(first), d: data.looks.markers[look(first)[1]], transform: `translate(${x} ${y}) scale(${size})`,
    fill: row.kind === "stock" ? "none" : colour(first), stroke: row.kind === "stock" ? "currentColor" : null }),
  first === last ? null : svg("circle", { class: shade(last), cx: x, cy: y, r: size * 0.42, fill: colour(last) })];
}
const key = (row) => svg("svg", { width: 16, height: 14, class: "key", "aria-hidden": "true" }, marker(row, 8, 7, 5.5));

// ---- a box that scrolls says so ------------------------------------------------------------------------------------------

function scrollable(label, ...children) {
  const box = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, children);
  const hint = el("p", { class: "more-columns", hidden: true }, "There are more columns to the right: scroll the table sideways. →");
  const measure = () => {
    const hidden = box.scrollWidth - box.clientWidth;
    hint.hidden = hidden < 2;
    box.toggleAttribute("data-more", hidden - box.scrollLeft >= 2);
  };
  box.addEventListener("scroll", measure, { passive: true });
  new ResizeObserver(measure).observe(box);
  return [hint, box];
}

// ---- a table whose headings sort; without a choice rows stand in groups ------------------------------------------------

function sortable(id, columns, rows, groups, caption) {
  const body = el("tbody");
  const head = el("tr");
  function draw() {
    const sort = state.sorted[id];
    const sortColumn = sort && columns.find((column) => column.name === sort.name);
    head.replaceChildren(...columns.map((column) => heading(column, sortColumn === column && sort.direction)));
    const compare = (a, b) => {
      const [x, y] = [sortColumn.value(a), sortColumn.value(b)];
      if (!known(x) || !known(y)) return known(y) - known(x);
      return (typeof x === "string" ? x.localeCompare(y) : x - y) * (sort.direction === "ascending" ? 1 : -1);
    };
    const lines = [];
    let last = null;
    for (const row of sortColumn ? [...rows].sort(compare) : rows) {
      if (!sortColumn && groups && row.budget !== last) {
        last = row.budget;
        const title = el("span", {}, groups[last]);
        lines.push(el("tr", { class: "group" }, el("th", { scope: "colgroup", colspan: columns.length }, title)));
      }
      lines.push(el("tr", {}, columns.map((column, i) =>
        el(i ? "td" : "th", { scope: i ? null : "row", class: column.text ? "text" : null }, column.cell(row)))));
    }
    if (!lines.length) lines.push(el("tr", {}, el("td", { colspan: columns.length, class: "text" }, "No row fits the filters.")));
    body.replaceChildren(...lines);
  }
  function heading(column, direction) {
    const turn = () => {
      const first = column.text ? "ascending" : "descending";
      const second = column.text ? "descending" : "ascending";
      const now = state.sorted[id]?.name === column.name ? state.sorted[id].direction : null;
      state.sorted[id] = now === null ? { name: column.name, direction: first }
        : now === first ? { name: column.name, direction: second } : null;
      draw();
      head.querySelector(`[data-name="${CSS.escape(column.name)}"]`).focus();
    };
    const arrow = el("span", { class: "arrow", "aria-hidden": "true" }, direction ? (direction === "ascending" ? "▲" : "▼") : "");
    return el("th", { scope: "col", "aria-sort": direction || "none", class: column.text ? "text" : null },
      el("button", { type: "button", title: column.help, "data-name": column.name, onclick: turn }, ...(column.text ? [column.name, arrow] : [arrow, column.name])));
  }
  draw();
  const lines = () => [["model", ...columns.map((column) => column.name)],
    ...rows.map((row) => [model().title, ...columns.map((column) => column.value(row))])];
  return [...scrollable(caption, el("table", {}, el("caption", { class: "hidden" }, caption), el("thead", {}, head), body)),
    el("p", { class: "saves" }, csvButton(caption.replace(`${model().title}: `, ""), lines))];
}

const scheduleColumn = {
  name: "schedule", text: true, help: "What was pruned; opens the row", value: (row) => row.schedule,
  cell: (row) => [el("button", { type: "button", class: "row", onclick: () => openRow(row) }, key(row), breakable(row.label),
    row.marks.length ? el("sup", {}, letters(row)) : null),
    row.kind === "control" || row.kind === "stock" ? el("span", { class: "tag" }, KINDS[row.kind]) : null],
};
const numeric = (name, help, value, show = (x) => number(x), more = () => null) => ({
  name, help, value, cell: (row) => [show(value(row)), known(value(row)) ? more(row) : null],
});
const small = (text) => el("small", {}, text);
const verdictClass = (text) => (/^(beats|better)/.test(text) ? "good" : /^(below|worse)/.test(text) ? "bad" : "even");
const verdict = (comparison) => (comparison ? el("span", { class: `verdict ${verdictClass(comparison.verdict)}`,
  title: `${interval(comparison.difference)} against ${comparison.other}` }, comparison.verdict) : "");
const letters = (row) => row.marks.map((mark) => el("abbr", { title: mark }, data.marks[mark]));
const relColumn = numeric("Rel", "Mean of the benchmarks' shares of the unpruned scores, in percent; 95 % interval", (row) => row.rel);
relColumn.cell = (row) => [strongest(row, (row) => row.rel), known(row.rel_sd) ? small(`±${number(row.rel_sd)}`) : null,
  row.rel_interval ? small(between(...row.rel_interval)) : null];
const tokensColumn = numeric("tokens", "avg_visual_tokens: visual tokens, measured, average over the decoder's layers",
  (row) => row.cost.avg_visual_tokens, (x) => number(x, 0));
