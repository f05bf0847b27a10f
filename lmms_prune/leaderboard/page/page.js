"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const state = { model: 0, view: "table", sorted: {}, search: "", kind: "", budget: "", unmarked: false, columns: "scores",
  x: "tokens", y: "rel", task: "", changesRow: "", changesTask: "", direction: "worse", shown: 12, row: "", lost: [] };
const DEFAULTS = { ...state };
const model = () => data.models[state.model];
const KINDS = { unpruned: "unpruned", pruned: "pruned", control: "control", oracle: "oracle", stock: "other model class" };

// ---- elements: children are text nodes, so nothing that a data set or a model wrote is ever read as HTML ---------------

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value || ""; // the attribute is what the page's security policy forbids
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// ---- numbers ---------------------------------------------------------------------------------------------------------

const known = (value) => value !== null && value !== undefined;
const number = (value, digits = 1, sign = false) =>
  !known(value) ? "" : (sign && value > 0 ? "+" : "") + (Number(value.toFixed(digits)) + 0).toFixed(digits).replace("-", "−");
const three = (value) => (!known(value) ? "" : value >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3))));
const between = (low, high, digits = 1) => `${number(low, digits)} to ${number(high, digits)}`;
const breakable = (schedule) => schedule.replaceAll(",", ",\u200b");
const interval = ([value, low, high], digits = 1) => `${number(value, digits, true)} (${between(low, high, digits)})`;

// ---- links: what is shown stands behind # in the address; the back button returns to it -------------------------------

const LINKED = { view: "tab", search: "find", kind: "kind", columns: "columns", x: "against", y: "accuracy", task: "benchmark",
  changesTask: "of", direction: "direction", row: "row" };

function link(changes = {}) {
  const shown = { ...state, ...changes };
  const words = new URLSearchParams();
  if (shown.model) words.set("model", data.models[shown.model].title);
  for (const [key, name] of Object.entries(LINKED)) if (shown[key] !== DEFAULTS[key] && known(shown[key])) words.set(name, shown[key]);
  // Numbers of rows and budgets change with the results; names do not.
  if (shown.budget !== "") words.set("budget", model().budgets[shown.budget]);
  if (shown.changesRow !== "") words.set("schedule", model().rows[shown.changesRow].schedule);
  if (shown.unmarked) words.set("unmarked", "1");
  return `#${words}`;
}

function remember(step = true) {
  const address = link();
  if (address === (location.hash || "#")) return;
  history[step ? "pushState" : "replaceState"](null, "", address);
}

function restore() {
  const words = new URLSearchParams(location.hash.slice(1));
  Object.assign(state, DEFAULTS, { sorted: {}, lost: [] });
  const place = (list, name) => {
    if (!words.has(name)) return "";
    const index = list.indexOf(words.get(name));
    if (index < 0) state.lost.push(`${name} “${words.get(name)}”`);
    return index < 0 ? "" : String(index);
  };
  state.model = Number(place(data.models.map((one) => one.title), "model"));
  for (const [key, name] of Object.entries(LINKED)) if (words.has(name)) state[key] = words.get(name);
  const allowed = { view: Object.keys(VIEWS), kind: ["", ...Object.keys(KINDS)], columns: ["scores", "groups", "cost", "paper"],
    x: Object.keys(AXES), direction: ["worse", "better", ""] };
  if (data.models.length) {
    state.budget = place(model().budgets, "budget");
    state.changesRow = place(model().rows.map((row) => row.schedule), "schedule");
    const tasks = model().tasks.map((one) => one.task);
    Object.assign(allowed, { y: Object.keys(heights()), task: ["", ...tasks], changesTask: ["", ...tasks],
      row: ["", ...model().rows.map((row) => row.schedule)] });
  }
  for (const [key, values] of Object.entries(allowed)) {
    if (values.includes(state[key])) continue;
    state.lost.push(`${LINKED[key]} “${state[key]}”`);
    state[key] = DEFAULTS[key];
  }
  state.unmarked = words.has("unmarked");
  document.getElementById("dialog").close();
  draw();
  const row = state.row && model().rows.find((one) => one.schedule === state.row);
  if (row) openRow(row);
}

// ---- files to keep: a table as CSV, a plot as SVG or PNG --------------------------------------------------------------

function download(name, type, content) {
  const address = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  const anchor = el("a", { href: address, download: name });
  document.body.append(anchor);
  anchor.click();
  anchor.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}
const fileName = (what, ending) => `${`${data.title} ${model().title} ${what}`.replace(/[^\p{L}\p{N}.]+/gu, "-").replace(/^-|-$/g, "")}.${ending}`;
function csvCell(value) {
  if (typeof value === "number") return String(value);
  // A spreadsheet would run a text that begins so as a formula.
  const text = /^[=+@\-\t\r]/.test(value ?? "") ? `'${value}` : value ?? "";
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
const csv = (lines) => lines.map((line) => `${line.map(csvCell).join(",")}\r\n`).join("");
const saving = (name, onclick) => el("button", { type: "button", class: "save", title: `Download as ${name}`, onclick }, name);
const csvButton = (what, lines) => saving("CSV", () => download(fileName(what, "csv"), "text/csv;charset=utf-8", csv(lines())));

const DRAWN = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity", "paint-order", "font-size"];
function standalone(plot) {
  const copy = plot.cloneNode(true);
  const [from, to] = [plot, copy].map((root) => [root, ...root.querySelectorAll("*")]);
  from.forEach((node, i) => {
    const style = getComputedStyle(node);
    for (const name of DRAWN) to[i].setAttribute(name, style.getPropertyValue(name));
    for (const name of ["class", "tabindex", "role"]) to[i].removeAttribute(name);
  });
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("font-family", "system-ui, sans-serif");
  copy.prepend(svg("rect", { width: "100%", height: "100%", fill: getComputedStyle(document.body).backgroundColor }));
  return new XMLSerializer().serializeToString(copy);
}
function savePng(plot, name) {
  const image = new Image();
  image.onload = () => {
    const canvas = el("canvas", { width: 2 * plot.clientWidth, height: 2 * plot.clientHeight });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => download(name, "image/png", blob));
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(standalone(plot))}`;
}

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
    const column = sort && columns.find((one) => one.name === sort.name);
    head.replaceChildren(...columns.map((one) => heading(one, column === one && sort.direction)));
    const compare = (a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      if (!known(x) || !known(y)) return known(y) - known(x);
      return (typeof x === "string" ? x.localeCompare(y) : x - y) * (sort.direction === "ascending" ? 1 : -1);
    };
    const lines = [];
    let last = null;
    for (const row of column ? [...rows].sort(compare) : rows) {
      if (!column && groups && row.budget !== last) {
        last = row.budget;
        const title = el("span", {}, groups[last]);
        lines.push(el("tr", { class: "group" }, el("th", { scope: "colgroup", colspan: columns.length }, title)));
      }
      lines.push(el("tr", {}, columns.map((one, i) =>
        el(i ? "td" : "th", { scope: i ? null : "row", class: one.text ? "text" : null }, one.cell(row)))));
    }
    if (!lines.length) lines.push(el("tr", {}, el("td", { colspan: columns.length, class: "text" }, "No row fits the filters.")));
    body.replaceChildren(...lines);
  }
  function heading(one, direction) {
    const turn = () => {
      const first = one.text ? "ascending" : "descending";
      const second = one.text ? "descending" : "ascending";
      const now = state.sorted[id]?.name === one.name ? state.sorted[id].direction : null;
      state.sorted[id] = now === null ? { name: one.name, direction: first }
        : now === first ? { name: one.name, direction: second } : null;
      draw();
      head.querySelector(`[data-name="${CSS.escape(one.name)}"]`).focus();
    };
    const arrow = el("span", { class: "arrow", "aria-hidden": "true" }, direction ? (direction === "ascending" ? "▲" : "▼") : "");
    return el("th", { scope: "col", "aria-sort": direction || "none", class: one.text ? "text" : null },
      el("button", { type: "button", title: one.help, "data-name": one.name, onclick: turn }, ...(one.text ? [one.name, arrow] : [arrow, one.name])));
  }
  draw();
  const lines = () => [["model", ...columns.map((one) => one.name)],
    ...rows.map((row) => [model().title, ...columns.map((one) => one.value(row))])];
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
relColumn.cell = (row) => [strongest(row, (one) => one.rel), known(row.rel_sd) ? small(`±${number(row.rel_sd)}`) : null,
  row.rel_interval ? small(between(...row.rel_interval)) : null];
const tokensColumn = numeric("tokens", "avg_visual_tokens: visual tokens, measured, average over the decoder's layers",
  (row) => row.cost.avg_visual_tokens, (x) => number(x, 0));

// ---- the table -------------------------------------------------------------------------------------------------------

function strongest(row, get, digits = 1, lower = false) {
  // An oracle is told the answers: it does not compete.
  const values = model().rows.filter((one) => one.budget === row.budget && one.kind !== "oracle").map(get).filter(known);
  const text = number(get(row), digits);
  const best = row.kind !== "oracle" && values.length > 1 && text === number((lower ? Math.min : Math.max)(...values), digits);
  return el(best ? "strong" : "span", {}, text);
}

// ▲ and ▼: real, after Holm's correction. △ and ▽: only before it.
const MARKS = { "▲": "good", "▼": "bad", "△": "even", "▽": "even" };
const markMeaning = (cell) => (MARKS[cell.mark] === "even" ? "not real after Holm's correction" : cell.verdict);
const mark = (cell, place = "turn") => (cell.mark ? el("span", { class: `${place} ${MARKS[cell.mark]}`,
  title: `${markMeaning(cell)}: ${interval(cell.change)}, p after Holm ${number(cell.p, 3)}` }, cell.mark) : null);

function scoreColumn(task) {
  const get = (row) => row.cells[task.task]?.score;
  const column = numeric(task.name, `${task.name} on the paper's scale`, get);
  column.cell = (row) => {
    const cell = row.cells[task.task];
    if (!cell) return "";
    return [strongest(row, get, task.digits, task.lower), mark(cell),
      known(cell.sd) ? small(`±${number(cell.sd, task.digits)}`) : null];
  };
  return column;
}

function columns() {
  if (state.columns === "cost") {
    const share = (name, key, whole) => numeric(name, `${whole}, in percent of the unpruned run`, (row) => row.cost[key], (x) => number(x, 0));
    const speed = share("speed %", "share_speed", "Samples a second, where all that changes times is the same");
    const shown = speed.cell;
    speed.cell = (row) => (row.cost.unlike ? el("small", { title: row.cost.no_share_speed }, row.cost.unlike)
      : [shown(row), known(speed.value(row)) ? small(between(row.cost.share_speed_low, row.cost.share_speed_high, 0)) : null]);
    const cost = (name, key, help) => numeric(name, help, (row) => row.cost[key], three);
    return [scheduleColumn, tokensColumn, share("tokens %", "share_tokens", "Visual tokens"),
      cost("KV MiB", "kv_mib", "The prefill's cache"), share("KV %", "share_kv", "The prefill's cache"),
      cost("TFLOPs", "prefill_tflops", "Prefill of the decoder"), share("FLOPs %", "share_flops", "Prefill of the decoder"),
      numeric("samples/s", "Generation, at the run's batch size; 95 % interval over the runs, without which there is no speed",
        (row) => row.cost.samples_per_second, three,
        (row) => small(`${three(row.cost.samples_per_second_low)} to ${three(row.cost.samples_per_second_high)}`)),
      speed, relColumn].filter((one) => one === speed || one.name !== "samples/s" || model().rows.some((row) => known(one.value(row))));
  }
  if (state.columns === "groups" && model().groups) {
    const mean = (group, key, help) => {
      const get = (row) => row.groups[group]?.[key];
      const column = numeric(`${group}: ${key === "acc" ? "Acc" : "Rel"}`, help, get);
      column.cell = (row) => strongest(row, get);
      return column;
    };
    return [scheduleColumn, tokensColumn, ...model().groups.names.flatMap((group) =>
      [mean(group, "acc", `Mean over ${model().groups.note}`), mean(group, "rel", "The same, relative to the unpruned run")]), relColumn]
      .filter((one) => one === scheduleColumn || model().rows.some((row) => known(one.value(row))));
  }
  const random = { name: "against random", text: true, help: "The random control at the same measured tokens",
    value: (row) => row.random?.verdict, cell: (row) => verdict(row.random) };
  const acc = numeric("Acc", "Mean of the benchmarks in percent", (row) => row.acc);
  acc.cell = (row) => strongest(row, (one) => one.acc);
  const blind = numeric("above blind", "(score − blind) / (unpruned − blind), in percent", (row) => row.above_blind);
  return [scheduleColumn, tokensColumn, relColumn, random, acc, ...model().tasks.map(scoreColumn), blind]
    .filter((one) => one === scheduleColumn || model().rows.some((row) => known(one.value(row))));
}

const matching = () => model().rows.filter((row) =>
  state.search.toLowerCase().split(/\s+/).every((word) => row.schedule.toLowerCase().includes(word) || row.label.toLowerCase().includes(word))
  && (!state.kind || row.kind === state.kind) && (state.budget === "" || row.budget === Number(state.budget))
  && !(state.unmarked && row.marks.length));

function tableView() {
  const holder = el("div");
  const status = el("p", { class: "status", role: "status" });
  const draw = () => {
    if (state.columns === "paper" && model().paper_costs) {
      status.textContent = "rows of Table 3; no filter holds here";
      holder.replaceChildren(...textTable(model().paper_costs));
      return;
    }
    const rows = matching();
    status.textContent = `${rows.length} of ${model().rows.length} rows`;
    holder.replaceChildren(...sortable("table", columns(), rows, model().budgets, `${model().title}: scores and cost`),
      ...(state.columns === "groups" && model().groups ? [el("p", { class: "hint" }, model().groups.note)] : []));
  };
  draw();
  const kinds = [...new Set(model().rows.map((row) => row.kind))];
  const used = [...new Set(model().rows.flatMap((row) => row.marks))];
  return [
    el("form", { class: "filters", onsubmit: (event) => event.preventDefault() },
      field("find", el("input", { type: "search", placeholder: "dart random …", value: state.search,
        oninput: (event) => { state.search = event.target.value; draw(); remember(false); } })),
      choice("kind", "kind", [["", "all"], ...kinds.map((kind) => [kind, KINDS[kind]])], draw),
      choice("budget", "budget", [["", "all"], ...model().budgets.map((title, i) => [String(i), title])], draw),
      choice("columns", "columns", [["scores", "scores"], ["groups", "means by group"], ["cost", "cost"], ["paper", "cost beside Table 3"]]
        .filter(([key]) => !(key === "groups" && !model().groups) && !(key === "paper" && !model().paper_costs)), draw),
      data.models.some((one) => one.rows.some((row) => row.marks.length)) ? el("label", { class: "check" },
        el("input", { type: "checkbox", checked: state.unmarked, onchange: (event) => { state.unmarked = event.target.checked; draw(); remember(); } }),
        "only rows without marks") : null,
      status),
    holder,
    used.length ? el("dl", { class: "marks" }, used.map((mark) => [el("dt", {}, data.marks[mark]), el("dd", {}, mark)])) : null,
  ];
}

// A table whose cells are texts already, in the order of the command's.
function textTable(table) {
  const head = el("tr", {}, table.columns.map((name, i) => el("th", { scope: "col", class: i < 2 ? "text" : null }, name)));
  const lines = table.lines.map((cells) => el("tr", {}, cells.map((text, i) =>
    el(i ? "td" : "th", { scope: i ? null : "row", class: i < 1 || /^[a-z]/i.test(text) ? "text" : null }, breakable(text)))));
  return [...scrollable(table.title, el("table", {}, el("caption", { class: "hidden" }, table.title), el("thead", {}, head), el("tbody", {}, lines))),
    el("p", { class: "saves" }, csvButton("cost beside Table 3", () => [table.columns, ...table.lines])),
  ...table.notes.map((note) => el("p", { class: "hint" }, note))];
}

const field = (name, control) => el("label", {}, el("span", {}, name), control);
function choice(name, key, options, changed) {
  return field(name, el("select", { name: key, onchange: (event) => { state[key] = event.target.value; changed(); remember(); } },
    options.map(([value, text]) => el("option", { value, selected: state[key] === value }, text))));
}

// ---- accuracy against cost -------------------------------------------------------------------------------------------

const AXES = {
  tokens: ["visual tokens a layer", (row) => row.cost.avg_visual_tokens],
  flops: ["prefill TFLOPs of the decoder", (row) => row.cost.prefill_tflops],
  kv: ["KV cache, MiB", (row) => row.cost.kv_mib],
  seconds: ["seconds a document", (row) => (known(row.cost.share_speed) || !row.baseline ? row.cost.seconds : null)],
};

function ticks(low, high, many) {
  const rough = (high - low || 1) / many;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function heights() {
  return { rel: ["Rel", (row) => row.rel, (row) => row.rel_interval], acc: ["Acc", (row) => row.acc, () => null],
    ...Object.fromEntries(model().tasks.map((task) => [task.task, [task.name, (row) => row.cells[task.task]?.score, () => null]])) };
}

function plot(width) {
  const [xName, x] = AXES[state.x];
  const [yName, y, sure] = heights()[state.y];
  const points = model().rows.filter((row) => known(x(row)) && known(y(row)));
  if (!points.length) return el("p", {}, "No row has both numbers.");
  const height = Math.max(300, Math.min(520, width * 0.55));
  const margin = { left: 46, right: 16, top: 14, bottom: 44 };
  const spans = points.flatMap((row) => sure(row) || [y(row)]);
  const room = (Math.max(...spans) - Math.min(...spans) || 1) * 0.06;
  const [low, high] = [Math.min(...spans) - room, Math.max(...spans) + room];
  const right = Math.max(...points.map(x)) * 1.05 || 1;
  const px = (value) => margin.left + (value / right) * (width - margin.left - margin.right);
  const py = (value) => height - margin.bottom - ((value - low) / (high - low)) * (height - margin.top - margin.bottom);
  const lines = [];
  for (const value of ticks(low, high, 6)) {
    lines.push(svg("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: py(value), y2: py(value) }),
      svg("text", { x: margin.left - 8, y: py(value) + 4, "text-anchor": "end" }, String(value)));
  }
  for (const value of ticks(0, right, width < 500 ? 4 : 8))
    lines.push(svg("line", { class: "grid", x1: px(value), x2: px(value), y1: margin.top, y2: height - margin.bottom }),
      svg("text", { x: px(value), y: height - margin.bottom + 18, "text-anchor": "middle" }, String(value)));
  lines.push(svg("text", { class: "axis", x: width - margin.right, y: height - 8, "text-anchor": "end" }, xName));
  const front = [];
  for (const row of [...points.filter((row) => row.kind !== "oracle")].sort((a, b) => x(a) - x(b) || y(b) - y(a)))
    if (!front.length || y(row) > y(front.at(-1))) front.push(row);
  lines.push(svg("polyline", { class: "front", points: front.map((row) => `${px(x(row))},${py(y(row))}`).join(" ") }));
  const status = document.getElementById("said");
  const tell = (row) => () => { if (status.isConnected) status.textContent =
    `${row.label}: ${yName} ${number(y(row))}${sure(row) ? ` (${between(...sure(row))})` : ""} at ${three(x(row))} ${xName}`; };
  const boxes = [];
  const named = new Set();
  const places = apart(points.map((row) => [px(x(row)), py(y(row))]), { left: margin.left, right: width - margin.right, top: margin.top, bottom: height - margin.bottom });
  const placeOf = new Map(points.map((row, i) => [row, places[i]]));
  const names = (width < 500 ? [] : [...front, ...points.filter((row) => !front.includes(row))]).map((row) => {
    const [cx, cy] = placeOf.get(row);
    const wide = row.label.length * 6.4;
    const flip = cx + 10 + wide > width - margin.right;
    const box = { left: flip ? cx - 10 - wide : cx + 10, top: cy - 9 };
    const free = (other) => other.left > box.left + wide || other.left + other.wide < box.left || Math.abs(other.top - box.top) > 14;
    const clear = points.every((one) => one === row || !(placeOf.get(one)[0] > box.left - 6 && placeOf.get(one)[0] < box.left + wide + 6 && Math.abs(placeOf.get(one)[1] - box.top - 9) < 12));
    if (box.left < margin.left || !clear || !boxes.every(free)) return null;
    boxes.push({ ...box, wide });
    named.add(row);
    return svg("text", { class: "name", x: box.left + (flip ? wide : 0), y: box.top + 13, "text-anchor": flip ? "end" : "start" }, row.label);
  });
  const numbered = points.filter((row) => !named.has(row));
  const dots = points.map((row) => {
    const [cx, cy] = placeOf.get(row);
    const [trueX, trueY] = [px(x(row)), py(y(row))];
    return svg("g", { class: `point ${row.kind}`, tabindex: "0", role: "button", "aria-label": row.label,
      onclick: () => openRow(row), onfocus: () => tell(row)(), onmouseenter: () => tell(row)(),
      onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); openRow(row); } } },
      Math.hypot(cx - trueX, cy - trueY) > 2 ? svg("line", { class: "leader", x1: trueX, y1: trueY, x2: cx, y2: cy }) : null,
      marker(row, cx, cy, 6),
      named.has(row) ? null : svg("text", { class: "nth", x: cx + (width < 500 ? 8 : -8), y: cy - 4, "text-anchor": width < 500 ? "start" : "end" }, String(numbered.indexOf(row) + 1)),
      svg("circle", { class: "target", cx, cy, r: 10 }), svg("title", {}, row.label));
  });
  const spreads = points.filter((row) => sure(row)).map((row) => svg("line", { class: "spread", x1: px(x(row)), x2: px(x(row)),
    y1: py(sure(row)[0]), y2: py(sure(row)[1]) }));
  const drawing = svg("svg", { class: "plot", width, height, viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": `${yName} against ${xName}` }, lines, spreads, names, dots);
  const tableLines = () => [["model", "schedule", xName, yName, "low", "high"],
    ...points.map((row) => [model().title, row.schedule, x(row), y(row), ...(sure(row) || ["", ""])])];
  const what = `${yName} against ${xName}`;
  return el("div", {}, drawing,
    numbered.length ? el("ol", { class: "numbered" }, numbered.map((row) => el("li", {}, key(row),
      el("button", { type: "button", class: "row", onclick: () => openRow(row) }, breakable(row.label))))) : null,
    el("p", { class: "saves" }, csvButton(what, tableLines),
      saving("SVG", () => download(fileName(what, "svg"), "image/svg+xml", standalone(drawing))),
      saving("PNG", () => savePng(drawing, fileName(what, "png")))));
}

// Moves points that would cover each other apart, as little as it takes; a line leads to the true place.
function apart(points, room) {
  const moved = points.map(([x, y]) => [x, y]);
  const least = 13;
  for (let round = 0; round < 80; round += 1) {
    let still = true;
    for (let i = 0; i < moved.length; i += 1) for (let j = 0; j < i; j += 1) {
      let [dx, dy] = [moved[i][0] - moved[j][0], moved[i][1] - moved[j][1]];
      const distance = Math.hypot(dx, dy);
      if (distance >= least) continue;
      still = false;
      // Points at one place go into directions of their own: the golden angle never repeats one.
      if (distance < 0.01) [dx, dy] = [Math.cos(2.4 * i), Math.sin(2.4 * i)];
      const push = (least - distance) / 2 / (distance < 0.01 ? 1 : distance);
      for (const [one, sign] of [[moved[i], 1], [moved[j], -1]]) {
        one[0] = Math.min(room.right, Math.max(room.left, one[0] + sign * push * dx));
        one[1] = Math.min(room.bottom, Math.max(room.top, one[1] + sign * push * dy));
      }
    }
    if (still) break;
  }
  return moved;
}

const usable = (axis) => model().rows.some((row) => known(AXES[axis][1](row)));

function tradeoffView() {
  const holder = el("div", { class: "canvas" });
  const title = el("p", { class: "axis-name" });
  const draw = () => {
    title.textContent = heights()[state.y][0];
    holder.replaceChildren(plot(Math.max(280, holder.clientWidth || 800)));
  };
  const drawable = (name) => name in heights() && model().rows.some((row) => known(heights()[name][1](row)));
  // Tasks that count in no mean leave Rel empty: then the first benchmark is drawn.
  if (!drawable(state.y)) state.y = ["rel", ...model().tasks.map((task) => task.task)].find(drawable) || "rel";
  const methods = [...new Map(model().rows.map((row) => [row.kind === "stock" ? "stock" : row.methods[0], row])).entries()];
  if (!usable(state.x)) state.x = "tokens";
  redraw = draw;
  // Its width is known once it stands in the page.
  requestAnimationFrame(() => holder.childElementCount || draw());
  return [
    el("form", { class: "filters", onsubmit: (event) => event.preventDefault() },
      choice("accuracy", "y", Object.entries(heights()).map(([key, [name]]) => [key, name]), draw),
      choice("against", "x", Object.entries(AXES).filter(([key]) => usable(key))
        .map(([key, [name]]) => [key, name]), draw)),
    title, holder,
    el("p", { id: "said", class: "said", role: "status" }, "Point at a row to read it here; open it for its command."),
    el("ul", { class: "legend" }, methods.map(([name, row]) => el("li", {}, key({ ...row, methods: [row.methods[0]] }),
      name === "none" ? "unpruned" : name === "stock" ? KINDS.stock : row.methods.length === 1 && row.kind !== "pruned" ? `${name} (${KINDS[row.kind]})` : name)),
      model().rows.some((row) => row.methods.length > 1) ? el("li", {}, "a dot inside: the last stage's method") : null,
      el("li", {}, svg("svg", { width: 22, height: 14, class: "key", "aria-hidden": "true" }, svg("line", { class: "front", x1: 0, x2: 22, y1: 7, y2: 7 })),
        "nothing cheaper is better"), el("li", {}, "whiskers: 95 % interval of Rel")),
  ];
}

// ---- one benchmark ---------------------------------------------------------------------------------------------------

function whisker([value, low, high], reach, sign) {
  const place = (one) => 60 + (Math.max(-reach, Math.min(reach, one)) / reach) * 56;
  const direction = MARKS[sign] || "even";
  return svg("svg", { class: `whisker ${direction}`, width: 120, height: 16, "aria-hidden": "true" },
    svg("line", { class: "zero", x1: 60, x2: 60, y1: 0, y2: 16 }), svg("line", { x1: place(low), x2: place(high), y1: 8, y2: 8 }),
    svg("circle", { class: MARKS[sign] === "even" ? "hollow" : null, cx: place(value), cy: 8, r: 3.5 }));
}

function statistics(task, reach) {
  const get = (key) => (row) => row.cells[task.task]?.[key];
  const column = (name, key, help, digits = 1) => numeric(name, help, get(key), (x) => number(x, digits));
  const score = scoreColumn(task);
  score.name = "score";
  const change = numeric("change", "Row minus unpruned run, on the same documents, with its 95 % interval", (row) => get("change")(row)?.[0]);
  change.cell = (row) => {
    const difference = get("change")(row);
    return difference ? [whisker(difference, reach, get("mark")(row)), el("span", { class: "figure" }, number(difference[0], task.digits, true)),
      mark(row.cells[task.task], "beside"), small(between(difference[1], difference[2], task.digits))] : "";
  };
  const random = { name: "against random", text: true, help: "The random control at the same measured tokens",
    value: (row) => get("random")(row)?.verdict, cell: (row) => verdict(get("random")(row)) };
  const published = numeric("published", "The paper's value, and ours minus it", get("published"), (x) => number(x, task.digits),
    (row) => (get("unlike")(row) ? el("small", { title: `Not compared: ${get("unlike")(row).join("; ")}` }, "other protocol")
      : small(number(get("score")(row) - get("published")(row), task.digits, true))));
  const extras = [...new Set(model().rows.flatMap((row) => Object.keys(get("extras")(row) || {})))]
    .map((name) => numeric(name, `${name}, in percent`, (row) => get("extras")(row)?.[name]));
  return [score, change, column("p, Holm", "p", "p of no change, corrected for the number of benchmarks", 3),
    column("lost", "lost", "Documents (MME: images; MMBench: circular groups) that turned wrong", 0), column("gained", "gained", "… that turned right", 0),
    column("of", "units", "… of so many", 0),
    column("same %", "same", "Documents with the same answer"), column("detectable", "detectable", "The smallest true change found with 80 % power", task.digits),
    column("kept %", "kept", "Share of the unpruned score"), column("above blind", "above_blind", "(score − blind) / (unpruned − blind), in percent"),
    random, published, ...extras].filter((one) => model().rows.some((row) => known(one.value(row))));
}

const reachOf = (task) => Math.max(1e-9, ...model().rows.flatMap((row) => (row.cells[task.task]?.change || []).map(Math.abs)));

function benchmarkView() {
  const holder = el("div");
  if (!model().tasks.some((one) => one.task === state.task)) state.task = model().tasks[0]?.task;
  const draw = () => {
    const task = model().tasks.find((one) => one.task === state.task);
    const rows = model().rows.filter((row) => row.cells[task.task]);
    holder.replaceChildren(...sortable("benchmark", [scheduleColumn, tokensColumn, ...statistics(task, reachOf(task))], rows,
      model().budgets, `${model().title}: ${task.name}`));
  };
  if (!state.task) return [el("p", {}, "No benchmark was evaluated.")];
  draw();
  return [el("form", { class: "filters", onsubmit: (event) => event.preventDefault() },
    choice("benchmark", "task", model().tasks.map((one) => [one.task, one.name]), draw)), holder];
}

// ---- changed answers -------------------------------------------------------------------------------------------------

function bits(text, many) {
  const bytes = atob(text);
  return Array.from({ length: many }, (_, i) => (bytes.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1);
}

// An image that fills only a part of its grid, whose first row and column, height and width are given.
function placed([rows, columns], [top, left, height, width]) {
  const percent = (part, all) => `${(100 * part) / all}%`;
  return `top: ${percent(top, rows)}; left: ${percent(left, columns)}; height: ${percent(height, rows)}; width: ${percent(width, columns)}`;
}

function picture(image, grid, kept, name, box) {
  const [rows, columns] = grid || [1, 1];
  const cells = kept ? kept.map((keep, i) => (keep ? "" : `M${i % columns} ${Math.floor(i / columns)}h1v1h-1z`)).join("") : "";
  const figure = el("div", { class: `picture${known(image) ? "" : " empty"}` },
    known(image) ? el("img", { src: data.images[image], alt: "", loading: "lazy", style: box ? placed(grid, box) : null }) : null,
    grid ? svg("svg", { viewBox: `0 0 ${columns} ${rows}`, preserveAspectRatio: "none", role: "img", "aria-label": name },
      svg("path", { d: cells })) : null);
  if (grid) figure.style.aspectRatio = `${columns} / ${rows}`;
  return figure;
}

function pictures(card, row) {
  const entry = data.changes.documents[card.document];
  const many = card.boxes ? card.grids.length : Math.max(entry.images?.length || 0, card.grids.length);
  if (!many) return null;
  const masks = card.bitmaps.map((stage) => stage.map((text, i) => bits(text, card.grids[i][0] * card.grids[i][1])));
  const holder = el("div", { class: "pictures" });
  const counted = masks.map((stage) => stage.flat().reduce((sum, one) => sum + one, 0));
  const whole = card.grids.reduce((sum, [rows, columns]) => sum + rows * columns, 0);
  const names = [`all ${whole}`, ...masks.map((_, i) => `${row.stages[i] || `stage ${i + 1}`}: ${counted[i]}`)];
  const buttons = names.map((name, i) => el("button", { type: "button", "aria-pressed": "false", onclick: () => show(i) }, name));
  function show(stage) {
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === stage)));
    holder.replaceChildren(...Array.from({ length: many }, (_, i) =>
      picture(entry.images?.[card.boxes ? card.boxes[i][0] : i], card.grids[i], stage ? masks[stage - 1][i] : null, `visual tokens, ${names[stage]}`, card.boxes?.[i].slice(1))));
  }
  show(masks.length ? 1 : 0);
  return [holder, masks.length ? el("div", { class: "stages", role: "group", "aria-label": "visual tokens left" }, buttons) : null];
}

function card(one) {
  const row = model().rows[one.row];
  const entry = data.changes.documents[one.document];
  const answer = (name, text, right) => [el("dt", {}, name), el("dd", { class: right === null ? null : right ? "good" : "bad" }, text || "(nothing)")];
  return el("article", { class: "card" },
    el("header", {}, el("strong", {}, `${model().tasks.find((task) => task.task === entry.task).name} ${entry.id}`),
      el("span", { class: `verdict ${one.worse ? "bad" : "good"}` }, one.worse ? "right → wrong" : "wrong → right")),
    el("p", { class: "schedule" }, breakable(row.label)), pictures(one, row),
    el("p", { class: "question" }, entry.question),
    el("dl", {}, answer("reference", entry.reference || "not in the samples", null), answer("unpruned", entry.before, one.worse), answer("pruned", one.after, !one.worse)));
}

function changesView() {
  const holder = el("div");
  const of = (one) => one.model === state.model && (state.changesRow === "" || one.row === Number(state.changesRow))
    && (!state.direction || one.worse === (state.direction === "worse"))
    && (!state.changesTask || data.changes.documents[one.document].task === state.changesTask);
  const total = () => model().rows.reduce((sum, row, i) => sum + (state.changesRow !== "" && i !== Number(state.changesRow) ? 0
    : Object.entries(row.flips).reduce((part, [task, [worse, better]]) => part + (state.changesTask && task !== state.changesTask ? 0
      : (state.direction === "better" ? 0 : worse) + (state.direction === "worse" ? 0 : better)), 0)), 0);
  const draw = () => {
    const cards = data.changes.cards.filter(of);
    const missing = cards.filter((one) => data.changes.documents[one.document].images?.includes(null)).length;
    const summary = `${total()} changed answers match; ${cards.length} of them are in this page`
      + (missing ? `, ${missing} of these without all of their images, for which there was no room` : "") + ".";
    const more = el("button", { type: "button", class: "more", onclick: () => { state.shown += 24; draw(); } },
      `Show ${Math.min(24, cards.length - state.shown)} more`);
    holder.replaceChildren(el("p", { class: "status", role: "status" }, summary),
      el("div", { class: "cards" }, cards.slice(0, state.shown).map(card)), cards.length > state.shown ? more : "");
  };
  const reset = () => { state.shown = 12; draw(); };
  const rows = model().rows.map((row, i) => [String(i), row.label]).filter(([i]) => Object.keys(model().rows[i].flips).length);
  if (!rows.some(([i]) => i === state.changesRow)) state.changesRow = "";
  if (!model().tasks.some((one) => one.task === state.changesTask)) state.changesTask = "";
  if (!rows.length) return [el("p", {}, "No row can be compared document by document: log samples (--log_samples) of the rows and of the unpruned run.")];
  reset();
  return [el("form", { class: "filters", onsubmit: (event) => event.preventDefault() },
    choice("schedule", "changesRow", [["", "all"], ...rows], reset),
    choice("benchmark", "changesTask", [["", "all"], ...model().tasks.map((one) => [one.task, one.name])], reset),
    choice("direction", "direction", [["worse", "right → wrong"], ["better", "wrong → right"], ["", "both"]], reset)),
  data.changes.pictured ? null : el("p", { class: "hint" },
    "Images are not in this page; the squares are the visual tokens that are left. To have them, add ",
    el("code", {}, "--images"), " to the command that made it, where lmms-eval finds its data."),
  el("p", { class: "hint" }, "Against the unpruned run; of several seeds the first. Documents on which most rows changed come first."), holder];
}

// ---- one row ---------------------------------------------------------------------------------------------------------

function command(text) {
  const button = el("button", { type: "button", class: "copy", onclick: async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected: press Ctrl+C";
    }
  } }, "Copy");
  const code = el("code", {}, text);
  return el("div", { class: "command" }, el("pre", { tabindex: "0" }, code), button);
}

function openRow(row) {
  const dialog = document.getElementById("dialog");
  const pairs = [["measured tokens", [number(row.cost.avg_visual_tokens, 0), row.cost.share_tokens, "%"]],
    ["Rel", [number(row.rel), null, row.rel_interval ? `(${between(...row.rel_interval)})` : ""]],
    ["Acc", [number(row.acc), null, ""]], ["KV cache", [`${three(row.cost.kv_mib)} MiB`, row.cost.share_kv, "%"]],
    ["prefill", [`${three(row.cost.prefill_tflops)} TFLOPs`, row.cost.share_flops, "%"]],
    ["speed", [known(row.cost.samples_per_second) ? `${three(row.cost.samples_per_second)} (${three(row.cost.samples_per_second_low)} to ${three(row.cost.samples_per_second_high)}) samples/s` : "",
      row.cost.share_speed, known(row.cost.share_speed) ? "%" : row.cost.unlike]]];
  const facts = pairs.filter(([, [text]]) => /\d/.test(text)).map(([name, [text, share, unit]]) => el("div", {}, el("dt", {}, name),
    el("dd", {}, text, known(share) ? small(`${number(share, 0)} ${unit} of unpruned`) : unit && unit !== "%" ? small(unit) : null)));
  const tasks = model().tasks.filter((task) => row.cells[task.task]?.change);
  const show = () => { Object.assign(state, { view: "changes", row: "", changesRow: String(model().rows.indexOf(row)) }); dialog.close(); draw(); remember(); };
  state.row = row.schedule;
  dialog.replaceChildren(
    el("header", {}, el("h2", { id: "dialog-title" }, key(row), breakable(row.schedule)),
      el("button", { type: "button", class: "close", "aria-label": "Close", onclick: () => dialog.close() }, "×")),
    el("p", { class: "kind" }, [KINDS[row.kind], row.seeds.length > 1 ? `seeds ${row.seeds.join(", ")}` : null, row.device || null,
      row.baseline ? `compared with ${row.baseline}` : null, row.submitters.length ? `submitted by ${row.submitters.join(", ")}` : null,
      row.date || null].filter(known).join(" · ")),
    row.random ? el("p", {}, verdict(row.random), ` ${interval(row.random.difference)} against ${row.random.other}`) : "",
    row.cost.no_share_speed ? el("p", { class: "hint" }, `Its speed is no share of the baseline's: ${row.cost.no_share_speed}.`) : "",
    row.marks.length ? el("ul", { class: "warnings" }, row.marks.map((mark) => el("li", {}, mark))) : "",
    el("dl", { class: "facts" }, facts),
    row.published ? el("p", {}, `The paper's row ${row.published.name}: Rel ${number(row.published.rel)}${known(row.published.acc) ? `, Acc ${number(row.published.acc)}` : ""}; ${row.published.unlike.length ? `not compared: ${row.published.unlike.join("; ")}` : `ours minus it: ${known(row.rel) ? number(row.rel - row.published.rel, 1, true) : "unknown"}`}.`) : "",
    row.commands.length ? el("h3", {}, row.commands.length > 1 ? "The commands that make it" : "The command that makes it") : "",
    ...row.commands.map(command),
    tasks.length ? el("h3", {}, "Against the unpruned run") : "",
    ...(tasks.length ? scrollable("Against the unpruned run", el("table", {}, el("thead", {}, el("tr", {}, ["benchmark", "score", "change", "p, Holm", "lost", "gained"]
      .map((name, i) => el("th", { scope: "col", class: i ? null : "text" }, name)))),
    el("tbody", {}, tasks.map((task) => {
      const cell = row.cells[task.task];
      return el("tr", {}, el("th", { scope: "row" }, task.name), el("td", {}, number(cell.score, task.digits)),
        el("td", {}, el("span", { class: verdictClass(cell.verdict) }, number(cell.change[0], task.digits, true)), mark(cell, "beside"), small(between(cell.change[1], cell.change[2], task.digits))),
        el("td", {}, number(cell.p, 3)), el("td", {}, number(cell.lost, 0)), el("td", {}, number(cell.gained, 0)));
    })))) : []),
    tasks.length ? el("p", { class: "hint" }, data.real) : "",
    Object.keys(row.flips).length ? el("p", {}, el("button", { type: "button", class: "more", onclick: show }, "Its changed answers")) : "");
  if (!dialog.open) dialog.showModal();
  remember();
}

// ---- notes, and the frame --------------------------------------------------------------------------------------------

function notesView() {
  const about = `${data.files} result files, the last of ${data.latest || "an unknown date"}; `
    + Object.entries(data.versions).filter(([, all]) => all.length).map(([name, all]) => `${name} ${all.join(" and ")}`).join(", ") + ".";
  return [
    data.problems.length ? [el("h2", {}, "What could not be read or compared"), el("ul", { class: "warnings" }, data.problems.map((one) => el("li", {}, one)))] : null,
    el("h2", {}, "How to read it"),
    el("ul", {}, data.notes.map((note) => el("li", {}, note)),
      el("li", {}, data.real), el("li", {}, "Bold: the best of its budget."),
      el("li", {}, "“Beats random” and “below random”: against the random control at the same measured tokens. Of Rel the interval excludes zero; of a benchmark p < 0.05 after Holm's correction.")),
    Object.keys(data.marks).length ? [el("h2", {}, "Marks"), el("dl", { class: "marks" },
      Object.entries(data.marks).map(([mark, letter]) => [el("dt", {}, letter), el("dd", {}, mark)]))] : null,
    el("h2", {}, "Made from"), el("p", {}, about)];
}

const VIEWS = { table: ["Table", tableView], tradeoff: ["Trade-off", tradeoffView], benchmark: ["Benchmarks", benchmarkView],
  changes: ["Changed answers", changesView], notes: ["Notes", notesView] };
let redraw = null;

function frame() {
  const names = Object.keys(VIEWS);
  const go = (view) => { Object.assign(state, { view, lost: [] }); draw(); remember(); document.getElementById(`tab-${view}`).focus(); };
  const keys = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) go(names[(names.indexOf(state.view) + step + names.length) % names.length]);
  };
  const theme = el("button", { type: "button", class: "theme", "aria-label": "Switch between light and dark", title: "Light or dark" }, "◐");
  theme.addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  const models = el("select", { "aria-label": "model", onchange: (event) => { Object.assign(state, { model: Number(event.target.value), budget: "", changesRow: "", changesTask: "", task: "", lost: [] }); draw(); remember(); } },
    data.models.map((one, i) => el("option", { value: i }, one.title)));
  document.getElementById("header").append(
    el("div", { class: "top" }, el("h1", {}, data.title), data.models.length > 1 ? models : el("span", {}, data.models[0]?.title || ""), theme),
    el("p", { class: "who" }, [data.submitters.length ? `Submitted by ${data.submitters.join(", ")}` : null,
      data.latest ? `runs of ${data.first === data.latest ? data.latest : `${data.first} to ${data.latest}`}` : null].filter(known).join(" · ")),
    el("div", { class: "tabs", role: "tablist", "aria-label": "views", onkeydown: keys }, names.map((name) =>
      el("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", onclick: () => go(name) }, VIEWS[name][0]))));
  document.getElementById("main").append(el("section", { id: "panel", role: "tabpanel" }));
  const dialog = document.getElementById("dialog");
  // Closed by its button, Escape or the back button; only the last has changed the address already.
  dialog.addEventListener("close", () => { if (!dialog.open && state.row) { state.row = ""; remember(); } });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  addEventListener("resize", () => redraw?.());
  addEventListener("popstate", restore);
}

function draw() {
  redraw = null;
  for (const name of Object.keys(VIEWS)) {
    const tab = document.getElementById(`tab-${name}`);
    tab.setAttribute("aria-selected", String(name === state.view));
    tab.tabIndex = name === state.view ? 0 : -1;
  }
  const models = document.querySelector('select[aria-label="model"]');
  if (models) models.value = String(state.model);
  const panel = document.getElementById("panel");
  panel.setAttribute("aria-labelledby", `tab-${state.view}`);
  const problems = data.problems.length && state.view === "table"
    ? el("p", { class: "hint" }, `${data.problems.length} of the results could not be read or compared; see Notes.`) : null;
  const lost = state.lost.length ? el("p", { class: "hint", role: "status" }, `This page does not have what the link names: ${state.lost.join(", ")}.`) : null;
  panel.replaceChildren(...[lost, problems, data.models.length ? VIEWS[state.view][1]() : el("p", {}, "There is no row to show.")].flat(Infinity).filter(known));
}

frame();
restore();
