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
