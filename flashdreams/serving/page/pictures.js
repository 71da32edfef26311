// Frames of a stream, decoded one by one: H.264 with WebCodecs, or JPEG.

import { parse } from './mp4.js';
import { Playout } from './playout.js';

/** H.264 with WebCodecs; every frame is decoded when it arrives. */
export class CodecPlayer {
  /** @returns {Promise<boolean>} whether this browser decodes H.264 this way, on this address */
  static async supported() {
    if (typeof VideoDecoder === 'undefined') return false;
    try {
      return (await VideoDecoder.isConfigSupported({ codec: 'avc1.42c01f' })).supported;
    } catch {
      return false;
    }
  }

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {Object} listener of `Playout`, and `onFailure(text)`
   */
  constructor(canvas, listener) {
    this.listener = listener;
    this.playout = new Playout(canvas, listener);
    this.format = 'm4s';
  }

  begin({ codec, fps }) {
    this.playout.begin(fps);
    this.codec = codec;
    this.epoch = 0;
    this.firstOfEpoch = 0;
    this.decoder?.state !== 'closed' && this.decoder?.close();
    this.needsKey = true;
    const decoder = new VideoDecoder({
      output: (picture) => this.onPicture(picture),
      error: (error) => this.decoder === decoder && this.listener.onFailure(error.message),
    });
    this.decoder = decoder;
  }

  push(meta, buffer) {
    if (this.decoder.state === 'closed') return;
    const { header, fragment } = parse(buffer);
    if (header) {
      this.decoder.configure({
        codec: this.codec,
        description: header.description,
        optimizeForLatency: true,
      });
      this.needsKey = true;
    }
    if (meta.epoch > this.epoch) {
      this.epoch = meta.epoch;
      this.firstOfEpoch = meta.first_frame;
      this.playout.clear();
      this.playout.anchor = null;
    }
    if (this.needsKey && !meta.key) return;
    this.needsKey = false;
    // The time stamp carries the frame's number through the decoder.
    this.decoder.decode(
      new EncodedVideoChunk({
        type: meta.key ? 'key' : 'delta',
        timestamp: meta.first_frame,
        data: fragment.sample,
      }),
    );
  }

  onPicture(picture) {
    if (picture.timestamp < this.firstOfEpoch) picture.close();
    else this.playout.push(picture, picture.timestamp);
  }

  hurry(frame) {
    this.playout.hurry(frame);
  }

  get waiting() {
    return this.playout.waiting + (this.decoder?.decodeQueueSize ?? 0);
  }

  clear() {
    this.playout.clear();
  }

  stop() {
    this.playout.stop();
    if (this.decoder && this.decoder.state !== 'closed') this.decoder.close();
  }
}

/** One JPEG per message: needs no video decoder, but more bandwidth. */
export class JpegPlayer {
  constructor(canvas, listener) {
    this.listener = listener;
    this.playout = new Playout(canvas, listener);
    this.format = 'jpeg';
  }

  begin({ fps }) {
    this.playout.begin(fps);
    this.epoch = 0;
    this.last = Promise.resolve();
  }

  push(meta, buffer) {
    if (meta.epoch > this.epoch) {
      this.epoch = meta.epoch;
      this.playout.clear();
      this.playout.anchor = null;
    }
    const decoded = createImageBitmap(new Blob([buffer], { type: 'image/jpeg' }));
    // Frames are shown in order, whichever is decoded first.
    this.last = Promise.allSettled([decoded, this.last]).then(([{ value, reason }]) => {
      if (reason) this.listener.onFailure(reason.message);
      else if (meta.epoch < this.epoch) value.close();
      else this.playout.push(value, meta.first_frame);
    });
  }

  hurry(frame) {
    this.playout.hurry(frame);
  }

  get waiting() {
    return this.playout.waiting;
  }

  clear() {
    this.playout.clear();
  }

  stop() {
    this.playout.stop();
  }
}
