// Maths between $ $, $$ $$, \( \) and \[ \], drawn by KaTeX, which is loaded with the first of it.

const BLOCK = /^ {0,3}(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\])[ \t]*(?:\n|$)/;
const DISPLAYED = /^(?:\$\$([^$\n]+?)\$\$|\\\[([^\n]+?)\\\])/;
const INLINE = /^(?:\\\(([^]+?)\\\)|\$(?![\s$])((?:[^$\n\\]|\\[^\n])*?[^\s$\\]|[^\s$\\])\$(?![\d$]))/;
const LIMITS = { trust: false, throwOnError: false, strict: 'ignore', maxExpand: 1000, maxSize: 50 };
const LONGEST = 20000;

function token(type, match, display) {
  return { type, raw: match[0], text: (match[1] ?? match[2]).trim(), display };
}

// KaTeX draws what stands in such an element, whoever wrote it: it makes no links and runs nothing.
function rendered({ text, display }) {
  const inner = text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
  return `<span class="tex" data-display="${display ? 1 : 0}">${inner}</span>`;
}

export const mathBlock = {
  name: 'mathBlock',
  level: 'block',
  start: (source) => source.match(/(?:^|\n) {0,3}(?:\$\$|\\\[)/)?.index,
  tokenizer(source) {
    const match = BLOCK.exec(source);
    return match ? token('mathBlock', match, true) : undefined;
  },
  renderer: (found) => `<p>${rendered(found)}</p>`,
};

export const mathInline = {
  name: 'mathInline',
  level: 'inline',
  start: (source) => source.match(/\$|\\\(|\\\[/)?.index,
  tokenizer(source) {
    const displayed = DISPLAYED.exec(source);
    if (displayed) return token('mathInline', displayed, true);
    const match = INLINE.exec(source);
    return match ? token('mathInline', match, false) : undefined;
  },
  renderer: rendered,
};

let loading = null;

function katex() {
  loading ??= (async () => {
    const address = new URL('../vendor/katex/', import.meta.url);
    document.head.append(
      Object.assign(document.createElement('link'), { rel: 'stylesheet', href: new URL('katex.min.css', address) }),
    );
    await import('../vendor/katex/katex.min.js');
    return globalThis.katex;
  })();
  return loading;
}

export function dressMaths(element) {
  const found = [...element.querySelectorAll('.tex'), ...element.querySelectorAll('code.language-math')];
  if (found.length) katex().then((library) => found.forEach((each) => draw(library, each)));
}

function draw(library, element) {
  const tex = element.textContent;
  if (tex.length > LONGEST) return;
  const fenced = element.tagName === 'CODE';
  const drawn = document.createElement('span');
  drawn.className = 'maths';
  try {
    library.render(tex, drawn, { ...LIMITS, displayMode: fenced || element.dataset.display === '1' });
  } catch {
    return; // it stays as it was written
  }
  if (fenced) (element.closest('.code') ?? element).replaceWith(drawn);
  else element.replaceWith(drawn);
}
