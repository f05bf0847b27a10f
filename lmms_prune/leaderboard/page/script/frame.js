// Notes, and the frame.

function notesView() {
  const about = `${data.files} result files, the last of ${data.latest || "an unknown date"}; `
    + Object.entries(data.versions).filter(([, all]) => all.length).map(([name, all]) => `${name} ${all.join(" and ")}`).join(", ") + ".";
  return [
    data.problems.length ? [el("h2", {}, "What could not be read or compared"), el("ul", { class: "warnings" }, data.problems.map((problem) => el("li", {}, problem)))] : null,
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
    data.models.map((model, i) => el("option", { value: i }, model.title)));
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
