// Changed answers.

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
  const counted = masks.map((stage) => stage.flat().reduce((sum, bit) => sum + bit, 0));
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

function card(change) {
  const row = model().rows[change.row];
  const entry = data.changes.documents[change.document];
  const answer = (name, text, right) => [el("dt", {}, name), el("dd", { class: right === null ? null : right ? "good" : "bad" }, text || "(nothing)")];
  return el("article", { class: "card" },
    el("header", {}, el("strong", {}, `${model().tasks.find((task) => task.task === entry.task).name} ${entry.id}`),
      el("span", { class: `verdict ${change.worse ? "bad" : "good"}` }, change.worse ? "right → wrong" : "wrong → right")),
    el("p", { class: "schedule" }, breakable(row.label)), pictures(change, row),
    el("p", { class: "question" }, entry.question),
    el("dl", {}, answer("reference", entry.reference || "not in the samples", null), answer("unpruned", entry.before, change.worse), answer("pruned", change.after, !change.worse)));
}

function changesView() {
  const holder = el("div");
  const of = (change) => change.model === state.model && (state.changesRow === "" || change.row === Number(state.changesRow))
    && (!state.direction || change.worse === (state.direction === "worse"))
    && (!state.changesTask || data.changes.documents[change.document].task === state.changesTask);
  const total = () => model().rows.reduce((sum, row, i) => sum + (state.changesRow !== "" && i !== Number(state.changesRow) ? 0
    : Object.entries(row.flips).reduce((part, [task, [worse, better]]) => part + (state.changesTask && task !== state.changesTask ? 0
      : (state.direction === "better" ? 0 : worse) + (state.direction === "worse" ? 0 : better)), 0)), 0);
  const draw = () => {
    const cards = data.changes.cards.filter(of);
    const missing = cards.filter((change) => data.changes.documents[change.document].images?.includes(null)).length;
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
  if (!model().tasks.some((task) => task.task === state.changesTask)) state.changesTask = "";
  if (!rows.length) return [el("p", {}, "No row can be compared document by document: log samples (--log_samples) of the rows and of the unpruned run.")];
  reset();
  return [el("form", { class: "filters", onsubmit: (event) => event.preventDefault() },
    choice("schedule", "changesRow", [["", "all"], ...rows], reset),
    choice("benchmark", "changesTask", [["", "all"], ...model().tasks.map((task) => [task.task, task.name])], reset),
    choice("direction", "direction", [["worse", "right → wrong"], ["better", "wrong → right"], ["", "both"]], reset)),
  data.changes.pictured ? null : el("p", { class: "hint" },
    "Images are not in this page; the squares are the visual tokens that are left. To have them, add ",
    el("code", {}, "--images"), " to the command that made it, where lmms-eval finds its data."),
  el("p", { class: "hint" }, "Against the unpruned run; of several seeds the first. Documents on which most rows changed come first."), holder];
}
