// Inputs of a controller, read from its JSON Schema: keys, look, and fields to draw.

/**
 * @typedef {Object} Reading
 * @property {?{letters: Map<string, string>, most: number}} keys letters and what they do, and how
 *     many may be held together; null without keys
 * @property {boolean} look whether the pointer turns the view
 * @property {Field[]} fields all others, in the order of the schema
 * @property {string[]} required properties that every message has to have
 *
 * @typedef {Object} Field
 * @property {string} name
 * @property {"slider"|"switch"|"choice"|"text"} kind
 * @property {string} title
 * @property {string} description
 * @property {*} initial
 * @property {Object} schema
 */

/**
 * Read a schema.
 * @param {?Object} controls `controls` of `video.start`
 * @returns {Reading}
 */
export function read(controls) {
  const properties = controls?.properties ?? {};
  const fields = [];
  for (const [name, schema] of Object.entries(properties)) {
    if (name === 'keys' || name === 'look') continue;
    const kind = kindOf(schema);
    if (!kind) continue;
    const title = schema.title ?? sentence(name.replaceAll('_', ' '));
    const initial = schema.default ?? initialOf(kind, schema);
    fields.push({ name, kind, title, description: schema.description ?? '', initial, schema });
  }
  return {
    keys: properties.keys ? keysOf(properties.keys) : null,
    look: Boolean(properties.look),
    fields,
    required: controls?.required ?? [],
  };
}

function sentence(words) {
  return words.charAt(0).toUpperCase() + words.slice(1);
}

function kindOf(schema) {
  if (Array.isArray(schema.enum)) return 'choice';
  if (schema.type === 'boolean') return 'switch';
  if (schema.type === 'number' || schema.type === 'integer') return 'slider';
  if (schema.type === 'string') return 'text';
  return null; // arrays and objects have no field
}

function initialOf(kind, schema) {
  if (kind === 'choice') return schema.enum[0];
  if (kind === 'switch') return false;
  if (kind === 'text') return '';
  return Math.min(Math.max(0, schema.minimum ?? 0), schema.maximum ?? Infinity);
}

/** The letters of `x-keys`; without it those of the pattern, with labels from the description. */
function keysOf(schema) {
  const most = schema.maxLength ?? Infinity;
  const named = schema['x-keys'];
  if (named) return { letters: new Map(Object.entries(named)), most };
  const [, letters] = /\[([^\]^\\-]+)\]/.exec(schema.pattern ?? '') ?? [null, 'wasd'];
  const words = new Map();
  for (const part of (schema.description ?? '').split(',')) {
    const [, letter, what] = /^\s*(\S):\s*(.+?)\s*$/.exec(part) ?? [];
    if (letter) words.set(letter, what);
  }
  return { letters: new Map([...letters].map((key) => [key, words.get(key) ?? ''])), most };
}

const ARROWS = {
  ArrowUp: [/look up|pitch up/, 'i', 'w'],
  ArrowDown: [/look down|pitch down/, 'k', 's'],
  ArrowLeft: [/(turn|look|steer|yaw) left/, 'j', 'a'],
  ArrowRight: [/(turn|look|steer|yaw) right/, 'l', 'd'],
};

/**
 * Mapping of the arrow keys: to keys that turn or look or, if there are none, to those that move.
 * @param {Map<string, string>} letters
 * @param {boolean} look whether arrows may turn the view instead
 * @returns {Map<string, string>} arrow to letter
 */
export function arrowsOf(letters, look) {
  const found = new Map();
  for (const [arrow, [words, turns, moves]] of Object.entries(ARROWS)) {
    const described = [...letters].find(([, what]) => words.test(what.toLowerCase()));
    if (described) found.set(arrow, described[0]);
    else if (letters.has(turns)) found.set(arrow, turns);
    else if (!look && letters.has(moves)) found.set(arrow, moves);
  }
  return found;
}
