// The boxes of a fragmented MP4 that a player reads (ISO/IEC 14496-12 and -15).

/**
 * @typedef {Object} Header
 * @property {Uint8Array} bytes `ftyp` and `moov`
 * @property {?Uint8Array} description body of `avcC`: the configuration of an H.264 decoder
 * @property {number} timescale ticks of the media in a second
 *
 * @typedef {Object} Fragment
 * @property {Uint8Array} bytes `moof` and `mdat`
 * @property {Uint8Array} sample the frame, as H.264 in AVCC form
 * @property {number} time presentation time, in ticks
 */

const CONTAINERS = new Set(['moov', 'trak', 'mdia', 'minf', 'stbl', 'moof', 'traf']);

function view(bytes) {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/**
 * The boxes in a range of bytes, in order.
 * @param {Uint8Array} bytes
 * @yields {{type: string, body: Uint8Array, start: number, end: number}}
 */
export function* boxes(bytes) {
  const data = view(bytes);
  for (let at = 0; at + 8 <= bytes.length; ) {
    let size = data.getUint32(at);
    let head = 8;
    if (size === 1 && at + 16 <= bytes.length) {
      size = Number(data.getBigUint64(at + 8));
      head = 16;
    } else if (size === 0) size = bytes.length - at;
    if (size < head || at + size > bytes.length) throw new Error('a box of the video is cut off');
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    yield { type, body: bytes.subarray(at + head, at + size), start: at, end: at + size };
    at += size;
  }
}

function find(bytes, wanted) {
  for (const box of boxes(bytes)) {
    if (box.type === wanted) return box.body;
    let inside = null;
    if (CONTAINERS.has(box.type)) inside = box.body;
    else if (box.type === 'stsd') inside = box.body.subarray(8);
    else if (box.type === 'avc1' || box.type === 'avc3') inside = box.body.subarray(78);
    const found = inside && find(inside, wanted);
    if (found) return found;
  }
  return null;
}

/**
 * Parse one binary message of the format "m4s".
 * @param {ArrayBuffer} buffer one fragment, in the first message after `ftyp` and `moov`
 * @returns {{header: ?Header, fragment: Fragment}}
 */
export function parse(buffer) {
  const bytes = new Uint8Array(buffer);
  let headerEnd = 0;
  let sample = null;
  for (const box of boxes(bytes)) {
    if (box.type === 'moov' || box.type === 'ftyp') headerEnd = box.end;
    if (box.type === 'mdat') sample = box.body;
  }
  if (!sample) throw new Error('a fragment of the video has no frame');
  const fragment = { bytes: bytes.subarray(headerEnd), sample, time: decodeTime(bytes) };
  if (!headerEnd) return { header: null, fragment };
  const header = bytes.subarray(0, headerEnd);
  const media = find(header, 'mdhd');
  return {
    header: {
      bytes: header,
      description: find(header, 'avcC'),
      timescale: media ? view(media).getUint32(media[0] === 1 ? 20 : 12) : 1000,
    },
    fragment,
  };
}

function decodeTime(bytes) {
  const body = find(bytes, 'tfdt');
  if (!body) return 0;
  return body[0] === 1 ? Number(view(body).getBigUint64(4)) : view(body).getUint32(4);
}

/**
 * The same fragment at another time.
 * @param {Uint8Array} fragment `moof` and `mdat`
 * @param {number} time in ticks
 * @returns {Uint8Array} a copy
 */
export function moved(fragment, time) {
  const copy = fragment.slice();
  const body = find(copy, 'tfdt');
  if (body && body[0] === 1) view(body).setBigUint64(4, BigInt(time));
  else if (body) view(body).setUint32(4, time);
  return copy;
}
