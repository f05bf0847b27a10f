// The table.

function strongest(row, get, digits = 1, lower = false) {
  // An oracle is told the answers: it does not compete.
  const values = model().rows.filter((other) => other.budget === row.budget && other.kind !== "oracle").map(get).filter(known);
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
      speed, relColumn].filter((column) => column === speed || column.name !== "samples/s" || model().rows.some((row) => known(column.value(row))));
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
      .filter((column) => column === scheduleColumn || model().rows.some((row) => known(column.value(row))));
  }
  const random = { name: "against random", text: true, help: "The random control at the same measured tokens",
    value: (row) => row.random?.verdict, cell: (row) => verdict(row.random) };
  const acc = numeric("Acc", "Mean of the benchmarks in percent", (row) => row.acc);
  acc.cell = (row) => strongest(row, (row) => row.acc);
  const blind = numeric("above blind", "(score − blind) / (unpruned − blind), in percent", (row) => row.above_blind);
  return [scheduleColumn, tokensColumn, relColumn, random, acc, ...model().tasks.map(scoreColumn), blind]
    .filter((column) => column === scheduleColumn || model().rows.some((row) => known(column.value(row))));
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
      data.models.some((model) => model.rows.some((row) => row.marks.length)) ? el("label", { class: "check" },
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
