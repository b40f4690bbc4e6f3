// Elements from text, never from HTML: whatever a record holds stays text.

/** An element: h("p", {class: "note", onclick: f}, "text", child, …). */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const $ = (id) => document.getElementById(id);

/** A share as percent; what is not all (or nothing) is never rounded to it. */
export function percent(share, digits = 1) {
  if (share === null || share === undefined) return "–";
  const text = (100 * share).toFixed(digits);
  if (share < 1 && text === (100).toFixed(digits)) return `> ${(100 - 10 ** -digits).toFixed(digits)} %`;
  if (share > 0 && text === (0).toFixed(digits)) return `< ${(10 ** -digits).toFixed(digits)} %`;
  return `${text} %`;
}

export const count = (number) => number.toLocaleString("en-US");

let hiding = null;

/** Tell the reviewer something, at the bottom of the window; also to screen readers. */
export function notify(text, kind = "") {
  const notice = $("notice");
  notice.textContent = text;
  notice.className = kind;
  notice.hidden = !text;
  clearTimeout(hiding);
  if (kind !== "bad") hiding = setTimeout(() => (notice.hidden = true), 4000);
}
