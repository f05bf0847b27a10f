// One row.

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
