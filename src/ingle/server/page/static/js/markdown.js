// Text of a model as a page shows it. Three walls stand between it and the browser: markup that a model writes is shown
// as text, what the parser makes is sanitized, and the page's Content-Security-Policy runs no script but files of ours.

import { Marked } from '../vendor/marked/marked.esm.js';
import { dressCode } from './code.js';
import { cjkStrong, plainTilde, soberUrl } from './marks.js';
import { dressMaths, mathBlock, mathInline } from './maths.js';
import { sanitized } from './sanitize.js';

const HARMLESS = /^<(?:br|\/?(?:sub|sup|kbd|details|summary|u))\s*\/?>$/i;
const HEADING_LEVEL = 1; // a heading of an answer stands below those of the page

function escaped(text) {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

const marked = new Marked({
  gfm: true,
  breaks: true,
  extensions: [mathBlock, mathInline, cjkStrong],
  tokenizer: { del: plainTilde, url: soberUrl },
  renderer: {
    html({ text }) {
      return text
        .split(/(<[^<>]*>)/)
        .map((part) => (HARMLESS.test(part) ? part : escaped(part)))
        .join('');
    },
    heading({ tokens, depth }) {
      const level = Math.min(depth + HEADING_LEVEL, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    image({ href, text }) {
      return `<a class="image" href="${escaped(href)}">${escaped(text || href)}</a>`;
    },
    checkbox({ checked }) {
      return checked ? '☑ ' : '☐ ';
    },
  },
});

// A text that grows, in an element. What is settled is left alone: only the last block is parsed and drawn again.
export class Growing {
  constructor(element) {
    this.element = element;
    this.blocks = [];
    this.settled = 0; // of the text's characters, those before the last block
  }

  show(text, { whole = false } = {}) {
    if (whole || text.length < this.settled) this.settled = 0;
    const kept = this.settled ? this.blocks.filter((block) => block.end <= this.settled) : [];
    const blocks = [...kept, ...this.parsed(text)];
    blocks.forEach((block, at) => this.place(block, at, whole || at < blocks.length - 1));
    for (const { element } of this.blocks.slice(blocks.length)) element?.remove();
    this.blocks = blocks;
    this.settled = blocks.length > 1 ? blocks.at(-1).start : 0;
  }

  parsed(text) {
    const found = [];
    let at = this.settled;
    for (const token of marked.lexer(text.slice(this.settled))) {
      const start = at;
      at += token.raw.length;
      if (token.type !== 'space' && token.type !== 'def') found.push({ token, raw: token.raw, start, end: at });
    }
    return found;
  }

  // `closed`: nothing can be added to it any more.
  place(block, at, closed) {
    const before = this.blocks[at];
    if (before === block) return;
    if (before?.raw === block.raw && before.closed === closed && before.start === block.start) {
      block.element = before.element;
      block.closed = closed;
      return;
    }
    block.closed = closed;
    if (before && !closed && growsCode(before, block)) {
      block.element = before.element;
      block.element.querySelector('code').textContent = block.token.text;
      return;
    }
    block.element = drawn(block.token, closed);
    if (before?.element?.parentNode) before.element.replaceWith(block.element);
    else this.element.append(block.element);
  }
}

function growsCode(before, block) {
  return (
    before.token.type === 'code' &&
    block.token.type === 'code' &&
    before.token.lang === block.token.lang &&
    before.start === block.start
  );
}

function drawn(token, closed) {
  const element = document.createElement('div');
  element.className = 'block';
  element.append(sanitized(marked.parser([token])));
  dressCode(element, closed);
  dressMaths(element);
  for (const table of element.querySelectorAll('table')) {
    const frame = document.createElement('div');
    frame.className = 'table';
    frame.tabIndex = 0;
    frame.setAttribute('role', 'group');
    table.replaceWith(frame);
    frame.append(table);
  }
  return element;
}
