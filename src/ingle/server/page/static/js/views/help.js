// What can be done with keys.

import { dialog, h } from '../dom.js';
import { t } from '../words.js';

const COMMAND = /Mac|iPhone|iPad/.test(navigator.platform) ? '⌘' : 'Ctrl';
export const SHORTCUTS = [
  ['Enter', 'key_send'],
  ['Shift Enter', 'key_line'],
  ['Esc', 'key_stop'],
  ['↑', 'key_editLast'],
  ['Shift Esc', 'key_write'],
  [`${COMMAND} Shift O`, 'key_new'],
  [`${COMMAND} K`, 'key_search'],
  [`${COMMAND} Shift S`, 'key_sidebar'],
  [`${COMMAND} Shift ;`, 'key_copy'],
  [`${COMMAND} ,`, 'key_settings'],
  [`${COMMAND} /`, 'key_help'],
];

export function showHelp() {
  const rows = SHORTCUTS.map(([keys, name]) => [
    h(
      'dt',
      {},
      keys.split(' ').map((key) => h('kbd', {}, key)),
    ),
    h('dd', {}, t(name)),
  ]);
  return dialog(t('shortcuts'), h('div', { class: 'sheet-body' }, h('dl', { class: 'shortcuts' }, rows)), {
    className: 'small',
    closeLabel: t('close'),
  });
}
