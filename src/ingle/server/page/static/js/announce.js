// What screen readers are told, and what is shown for a while at the edge.

import { h, iconButton } from './dom.js';
import { t } from './words.js';

const SHOWN_MS = 7000;
const polite = h('div', { class: 'offscreen', role: 'status', 'aria-live': 'polite' });
const notes = h('div', { class: 'notes' });

export function installAnnouncements() {
  document.body.append(polite, notes);
}

export function announce(text) {
  polite.textContent = '';
  setTimeout(() => {
    polite.textContent = text;
  }, 50); // else the same words twice are said once
}

// `action` is a label and what it does.
export function note(text, { kind = 'plain', action } = {}) {
  const close = () => shown.remove();
  const act =
    action &&
    h(
      'button',
      {
        type: 'button',
        class: 'text-button',
        onclick: () => {
          close();
          action[1]();
        },
      },
      action[0],
    );
  const shown = h(
    'div',
    { class: `note ${kind}`, role: kind === 'bad' ? 'alert' : 'status' },
    h('span', {}, text),
    act,
    iconButton('close', t('close'), close),
  );
  notes.append(shown);
  while (notes.children.length > 3) notes.firstElementChild.remove();
  if (kind !== 'bad') setTimeout(close, SHOWN_MS);
  return close;
}
