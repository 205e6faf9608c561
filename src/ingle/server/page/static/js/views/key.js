// Asks for the key of a server that wants one, and resolves to whether somebody gave it.

import { keepKey } from '../api.js';
import { dialog, h } from '../dom.js';
import { t } from '../words.js';

export function askKey(wrong) {
  return new Promise((resolve) => {
    let given = false;
    const field = h('input', {
      type: 'password',
      id: 'key',
      autocomplete: 'current-password',
      required: true,
      autofocus: true,
      'aria-describedby': 'key-why',
    });
    const remember = h('input', { type: 'checkbox', checked: true });
    const take = (event) => {
      event.preventDefault();
      if (!field.value.trim()) return;
      keepKey(field.value.trim(), remember.checked);
      given = true;
      shown.close();
    };
    const form = h(
      'form',
      { class: 'sheet-body', onsubmit: take },
      h('p', { id: 'key-why', class: wrong ? 'bad' : '' }, t(wrong ? 'keyWrong' : 'keyWanted')),
      h('div', { class: 'field' }, h('label', { for: 'key' }, t('apiKey')), field),
      h('label', { class: 'check' }, remember, h('span', {}, t('rememberKey'))),
      h('div', { class: 'row' }, h('button', { type: 'submit', class: 'button' }, t('goAhead'))),
    );
    const shown = dialog(t('apiKey'), form, { className: 'small', closeLabel: t('close') });
    shown.addEventListener('close', () => resolve(given));
  });
}
