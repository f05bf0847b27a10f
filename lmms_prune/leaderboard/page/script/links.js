// Links: what is shown stands behind # in the address; the back button returns to it.

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
  state.model = Number(place(data.models.map((model) => model.title), "model"));
  for (const [key, name] of Object.entries(LINKED)) if (words.has(name)) state[key] = words.get(name);
  const allowed = { view: Object.keys(VIEWS), kind: ["", ...Object.keys(KINDS)], columns: ["scores", "groups", "cost", "paper"],
    x: Object.keys(AXES), direction: ["worse", "better", ""] };
  if (data.models.length) {
    state.budget = place(model().budgets, "budget");
    state.changesRow = place(model().rows.map((row) => row.schedule), "schedule");
    const tasks = model().tasks.map((task) => task.task);
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
  const row = state.row && model().rows.find((row) => row.schedule === state.row);
  if (row) openRow(row);
}
