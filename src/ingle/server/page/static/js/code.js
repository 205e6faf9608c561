// Blocks of code: a bar that says the language and copies, and colours once the block is whole.

import { copyButton } from './copy.js';
import { h } from './dom.js';
import { sanitized } from './sanitize.js';

const LONGEST = 100000; // characters that are coloured; more take too long

let loading = null;

function highlighter() {
  loading ??= import('../vendor/highlight/highlight.min.js').then((module) => module.default);
  return loading;
}

export function dressCode(element, closed) {
  for (const code of element.querySelectorAll('pre > code')) {
    const language = /language-([\w+#.-]+)/.exec(code.className)?.[1] ?? '';
    const pre = code.parentElement;
    pre.tabIndex = 0;
    const bar = h(
      'div',
      { class: 'code-bar' },
      h('span', {}, language),
      copyButton(() => code.textContent.replace(/\n$/, ''), 'copyCode'),
    );
    const frame = h('div', { class: 'code' });
    pre.replaceWith(frame);
    frame.append(bar, pre);
    if (closed && language && code.textContent.length <= LONGEST) colour(code, language);
  }
}

async function colour(code, language) {
  const library = await highlighter();
  if (!library.getLanguage(language)) return;
  const { value } = library.highlight(code.textContent, { language, ignoreIllegals: true });
  code.replaceChildren(sanitized(value, { ALLOWED_TAGS: ['span'], ALLOWED_ATTR: ['class'] }));
}
