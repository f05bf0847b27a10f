// One benchmark.

function whisker([value, low, high], reach, sign) {
  const place = (number) => 60 + (Math.max(-reach, Math.min(reach, number)) / reach) * 56;
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
    random, published, ...extras].filter((column) => model().rows.some((row) => known(column.value(row))));
}

const reachOf = (task) => Math.max(1e-9, ...model().rows.flatMap((row) => (row.cells[task.task]?.change || []).map(Math.abs)));

function benchmarkView() {
  const holder = el("div");
  if (!model().tasks.some((task) => task.task === state.task)) state.task = model().tasks[0]?.task;
  const draw = () => {
    const task = model().tasks.find((task) => task.task === state.task);
    const rows = model().rows.filter((row) => row.cells[task.task]);
    holder.replaceChildren(...sortable("benchmark", [scheduleColumn, tokensColumn, ...statistics(task, reachOf(task))], rows,
      model().budgets, `${model().title}: ${task.name}`));
  };
  if (!state.task) return [el("p", {}, "No benchmark was evaluated.")];
  draw();
  return [el("form", { class: "filters", onsubmit: (event) => event.preventDefault() },
    choice("benchmark", "task", model().tasks.map((task) => [task.task, task.name]), draw)), holder];
}
