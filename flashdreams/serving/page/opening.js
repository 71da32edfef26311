// Inputs of a new session: prompt, first frame and seed.

import { byId } from './dom.js';

/** The form of a new session. */
export class Opening {
  /** @param {function()} onBegin called to start a new session */
  constructor(onBegin) {
    this.image = null;
    this.offer = null;
    byId('opening-form').addEventListener('submit', (event) => {
      event.preventDefault();
      onBegin();
    });
    byId('first-frame').addEventListener('change', (event) => this.take(event.target.files[0]));
    byId('no-first-frame').addEventListener('click', () => this.take(null));
    byId('dice').addEventListener('click', () => {
      byId('seed').value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
    });
  }

  /**
   * Draw the server's offer.
   * @param {Object} offer an entry of `/v1/models`
   */
  draw(offer) {
    this.offer = offer;
    byId('opening-prompt').placeholder = offer.prompt ?? '';
    byId('opening-prompt-field').hidden = offer.prompt === null && !offer.prompts_change;
    byId('first-frame-field').hidden = !offer.takes_image;
    byId('seed').placeholder = String(offer.seed);
    const steps = offer.num_inference_steps;
    byId('facts').textContent =
      `${offer.width} × ${offer.height} at ${Math.round(offer.fps * 10) / 10} frames/s, ` +
      `${steps} ${steps === 1 ? 'step' : 'steps'}`;
  }

  async take(file) {
    const preview = byId('first-frame-preview');
    this.image = null;
    if (file) {
      try {
        this.image = await this.reduced(file);
      } catch {
        byId('first-frame').value = '';
        byId('first-frame-name').textContent = `${file.name} is not an image that this browser can read.`;
        file = null;
      }
    } else byId('first-frame').value = '';
    if (file || !byId('first-frame-name').textContent.includes('is not an image')) {
      byId('first-frame-name').textContent = file ? file.name : 'Choose an image';
    }
    preview.hidden = !this.image;
    byId('no-first-frame').hidden = !this.image;
    if (this.image) preview.src = this.image;
    else preview.removeAttribute('src');
  }

  /** A data URL of the image, no larger than needed to cover the video. */
  async reduced(file) {
    const picture = await createImageBitmap(file);
    const { width, height } = this.offer;
    const cover = Math.max(width / picture.width, height / picture.height);
    const scale = Math.min(1, cover);
    const canvas = document.createElement('canvas');
    canvas.width = Math.max(1, Math.round(picture.width * scale));
    canvas.height = Math.max(1, Math.round(picture.height * scale));
    const context = canvas.getContext('2d');
    context.imageSmoothingQuality = 'high';
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    picture.close();
    return canvas.toDataURL('image/png');
  }

  /**
   * The first message of a new session.
   * @param {"m4s"|"jpeg"} format
   * @returns {Object} `session.start`
   */
  message(format) {
    const message = { type: 'session.start', format };
    const prompt = byId('opening-prompt').value.trim();
    const seed = byId('seed').value;
    if (prompt) message.prompt = prompt;
    if (seed !== '') message.seed = Number(seed);
    if (this.image) message.image_reference = { image_url: this.image };
    return message;
  }
}
