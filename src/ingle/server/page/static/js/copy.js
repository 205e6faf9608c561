// To the clipboard, also where the page came over plain HTTP from another machine, which browsers give no `clipboard`.

import { announce } from './announce.js';
import { icon, iconButton } from './dom.js';
import { t } from './words.js';

const SHOWN_MS = 1600;

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

function copyBySelection(text) {
  const focused = document.activeElement;
  const field = document.createElement('textarea');
  field.value = text;
  field.className = 'offscreen';
  (document.querySelector('dialog[open]') ?? document.body).append(field);
  field.select();
  const copied = document.execCommand('copy');
  field.remove();
  focused?.focus();
  return copied;
}

export function copyButton(text, label = 'copy') {
  const button = iconButton('copy', t(label), async () => {
    const copied = await copy(text());
    announce(t(copied ? 'copied' : 'notCopied'));
    if (!copied) return;
    button.replaceChildren(icon('check'));
    setTimeout(() => button.replaceChildren(icon('copy')), SHOWN_MS);
  });
  return button;
}
