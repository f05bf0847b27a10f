// Files to keep: a table as CSV, a plot as SVG or PNG.

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
