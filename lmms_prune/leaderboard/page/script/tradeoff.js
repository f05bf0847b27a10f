// Accuracy against cost.

const AXES = {
  tokens: ["visual tokens a layer", (row) => row.cost.avg_visual_tokens],
  flops: ["prefill TFLOPs of the decoder", (row) => row.cost.prefill_tflops],
  kv: ["KV cache, MiB", (row) => row.cost.kv_mib],
  seconds: ["seconds a document", (row) => (known(row.cost.share_speed) || !row.baseline ? row.cost.seconds : null)],
};

function ticks(low, high, many) {
  const rough = (high - low || 1) / many;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((multiple) => multiple * power).find((multiple) => multiple >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function heights() {
  return { rel: ["Rel", (row) => row.rel, (row) => row.rel_interval], acc: ["Acc", (row) => row.acc, () => null],
    ...Object.fromEntries(model().tasks.map((task) => [task.task, [task.name, (row) => row.cells[task.task]?.score, () => null]])) };
}

// From numbers to pixels: the ranges of what is drawn, with room for intervals.
function scales(points, x, [, y, interval], width) {
  const height = Math.max(300, Math.min(520, width * 0.55));
  const area = { left: 46, right: width - 16, top: 14, bottom: height - 44 };
  const spans = points.flatMap((row) => interval(row) || [y(row)]);
  const room = (Math.max(...spans) - Math.min(...spans) || 1) * 0.06;
  const [low, high] = [Math.min(...spans) - room, Math.max(...spans) + room];
  const right = Math.max(...points.map(x)) * 1.05 || 1;
  return { width, height, area, low, high, right,
    px: (value) => area.left + (value / right) * (area.right - area.left),
    py: (value) => area.bottom - ((value - low) / (high - low)) * (area.bottom - area.top) };
}

function gridLines({ width, height, area, low, high, right, px, py }, xName) {
  return [
    ...ticks(low, high, 6).flatMap((value) => [
      svg("line", { class: "grid", x1: area.left, x2: area.right, y1: py(value), y2: py(value) }),
      svg("text", { x: area.left - 8, y: py(value) + 4, "text-anchor": "end" }, String(value))]),
    ...ticks(0, right, width < 500 ? 4 : 8).flatMap((value) => [
      svg("line", { class: "grid", x1: px(value), x2: px(value), y1: area.top, y2: area.bottom }),
      svg("text", { x: px(value), y: area.bottom + 18, "text-anchor": "middle" }, String(value))]),
    svg("text", { class: "axis", x: area.right, y: height - 8, "text-anchor": "end" }, xName)];
}

// The rows than which nothing cheaper is better. An oracle is told the answers: it does not compete.
function frontier(points, x, y) {
  const front = [];
  for (const row of points.filter((row) => row.kind !== "oracle").sort((a, b) => x(a) - x(b) || y(b) - y(a)))
    if (!front.length || y(row) > y(front.at(-1))) front.push(row);
  return front;
}

// Names beside those points that have room for one, by row; the first rows choose first.
function pointNames(rows, placeOf, area) {
  const boxes = [];
  const names = new Map();
  for (const row of rows) {
    const [cx, cy] = placeOf.get(row);
    const wide = row.label.length * 6.4;
    const flip = cx + 10 + wide > area.right;
    const box = { left: flip ? cx - 10 - wide : cx + 10, top: cy - 9, wide };
    const free = boxes.every((other) => other.left > box.left + wide || other.left + other.wide < box.left || Math.abs(other.top - box.top) > 14);
    const clear = rows.every((other) => {
      const [x, y] = placeOf.get(other);
      return other === row || !(x > box.left - 6 && x < box.left + wide + 6 && Math.abs(y - box.top - 9) < 12);
    });
    if (box.left < area.left || !clear || !free) continue;
    boxes.push(box);
    names.set(row, svg("text", { class: "name", x: box.left + (flip ? wide : 0), y: box.top + 13, "text-anchor": flip ? "end" : "start" }, row.label));
  }
  return names;
}

function plot(width) {
  const [xName, x] = AXES[state.x];
  const [yName, y, interval] = heights()[state.y];
  const points = model().rows.filter((row) => known(x(row)) && known(y(row)));
  if (!points.length) return el("p", {}, "No row has both numbers.");
  const scale = scales(points, x, heights()[state.y], width);
  const { px, py, area } = scale;
  const front = frontier(points, x, y);
  const frontLine = svg("polyline", { class: "front", points: front.map((row) => `${px(x(row))},${py(y(row))}`).join(" ") });
  const reading = document.getElementById("reading");
  const read = (row) => () => { if (reading.isConnected) reading.textContent =
    `${row.label}: ${yName} ${number(y(row))}${interval(row) ? ` (${between(...interval(row))})` : ""} at ${three(x(row))} ${xName}`; };
  const places = apart(points.map((row) => [px(x(row)), py(y(row))]), area);
  const placeOf = new Map(points.map((row, i) => [row, places[i]]));
  const names = pointNames(width < 500 ? [] : [...front, ...points.filter((row) => !front.includes(row))], placeOf, area);
  const numbered = points.filter((row) => !names.has(row));
  const dots = points.map((row) => {
    const [cx, cy] = placeOf.get(row);
    const [trueX, trueY] = [px(x(row)), py(y(row))];
    return svg("g", { class: `point ${row.kind}`, tabindex: "0", role: "button", "aria-label": row.label,
      onclick: () => openRow(row), onfocus: read(row), onmouseenter: read(row),
      onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); openRow(row); } } },
      Math.hypot(cx - trueX, cy - trueY) > 2 ? svg("line", { class: "leader", x1: trueX, y1: trueY, x2: cx, y2: cy }) : null,
      marker(row, cx, cy, 6),
      names.has(row) ? null : svg("text", { class: "nth", x: cx + (width < 500 ? 8 : -8), y: cy - 4, "text-anchor": width < 500 ? "start" : "end" }, String(numbered.indexOf(row) + 1)),
      svg("circle", { class: "target", cx, cy, r: 10 }), svg("title", {}, row.label));
  });
  const whiskers = points.filter((row) => interval(row)).map((row) => svg("line", { class: "spread", x1: px(x(row)), x2: px(x(row)),
    y1: py(interval(row)[0]), y2: py(interval(row)[1]) }));
  const what = `${yName} against ${xName}`;
  const drawing = svg("svg", { class: "plot", width, height: scale.height, viewBox: `0 0 ${width} ${scale.height}`, role: "group",
    "aria-label": what }, gridLines(scale, xName), frontLine, whiskers, [...names.values()], dots);
  const tableLines = () => [["model", "schedule", xName, yName, "low", "high"],
    ...points.map((row) => [model().title, row.schedule, x(row), y(row), ...(interval(row) || ["", ""])])];
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
      for (const [point, sign] of [[moved[i], 1], [moved[j], -1]]) {
        point[0] = Math.min(room.right, Math.max(room.left, point[0] + sign * push * dx));
        point[1] = Math.min(room.bottom, Math.max(room.top, point[1] + sign * push * dy));
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
    el("p", { id: "reading", role: "status" }, "Point at a row to read it here; open it for its command."),
    el("ul", { class: "legend" }, methods.map(([name, row]) => el("li", {}, key({ ...row, methods: [row.methods[0]] }),
      name === "none" ? "unpruned" : name === "stock" ? KINDS.stock : row.methods.length === 1 && row.kind !== "pruned" ? `${name} (${KINDS[row.kind]})` : name)),
      model().rows.some((row) => row.methods.length > 1) ? el("li", {}, "a dot inside: the last stage's method") : null,
      el("li", {}, svg("svg", { width: 22, height: 14, class: "key", "aria-hidden": "true" }, svg("line", { class: "front", x1: 0, x2: 22, y1: 7, y2: 7 })),
        "nothing cheaper is better"), el("li", {}, "whiskers: 95 % interval of Rel")),
  ];
}
