// Creation of elements, and formatting of numbers and sizes.

/**
 * Create an element.
 * @param {string} tag
 * @param {Object} [properties] set on the element; `class`, `for`, `aria-*`, `data-*` and `role` as
 *     attributes, functions under `on...` as listeners
 * @param {...(Node|string|null)} children
 * @returns {HTMLElement}
 */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (/^(class|for|role|list|aria-.*|data-.*)$/.test(name)) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/**
 * The element with that id.
 * @param {string} id
 * @returns {HTMLElement}
 */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * Set a text only if it changes, so that nothing is laid out or read aloud again.
 * @param {Node} node
 * @param {string} text
 */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * Format bytes.
 * @param {number} bytes
 * @returns {string} such as "1.3 GiB"
 */
export function inBytes(bytes) {
  if (bytes >= 2 ** 30) return `${(bytes / 2 ** 30).toFixed(1)} GiB`;
  return `${Math.round(bytes / 2 ** 20)} MiB`;
}

/**
 * Format milliseconds.
 * @param {?number} ms
 * @returns {string} "-" if unknown
 */
export function inMs(ms) {
  if (ms === null || ms === undefined) return '–';
  return ms < 10 ? `${ms.toFixed(1)} ms` : `${Math.round(ms)} ms`;
}
