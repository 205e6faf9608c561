// How the model of a conversation answers: what it is told before, and what it draws by. An empty field is the
// model's own value.

import * as chats from '../chats.js';
import { dialog, h } from '../dom.js';
import { cardOf } from '../models.js';
import { NUMBERS } from '../request.js';
import { number, t } from '../words.js';

const SAMPLING = ['temperature', 'top_p', 'top_k', 'min_p', 'max_tokens', 'seed'];
const PENALTIES = ['repetition_penalty', 'presence_penalty', 'frequency_penalty'];

export function showSettings(conversation, keep) {
  const { settings } = conversation;
  const card = cardOf(settings.model);
  const changed = () => {
    keep();
    chats.touched(conversation);
  };
  const set = (name, value) => {
    if (value === undefined || value === '') delete settings[name];
    else settings[name] = value;
    changed();
  };
  const form = h('form', { class: 'sheet-body', onsubmit: (event) => event.preventDefault() });
  const draw = () =>
    form.replaceChildren(
      facts(card),
      text('system', settings, set, 5),
      h(
        'fieldset',
        { class: 'grid' },
        h('legend', {}, t('sampling')),
        SAMPLING.map((name) => numeric(name, settings, set, card)),
      ),
      thinking(settings, set),
      h(
        'details',
        {},
        h('summary', {}, t('more')),
        h(
          'div',
          { class: 'grid' },
          PENALTIES.map((name) => numeric(name, settings, set, card)),
        ),
        text('stop', settings, set, 2),
        json('tools', settings, set, Array.isArray),
        json('extra', settings, set, isObject),
      ),
      h('p', {}, h('button', { type: 'button', class: 'text-button', onclick: reset }, t('reset'))),
    );
  const reset = () => {
    for (const name of Object.keys(settings)) if (name !== 'model') delete settings[name];
    changed();
    draw();
  };
  draw();
  return dialog(t('settings'), form, { className: 'sheet', closeLabel: t('close') });
}

function facts(card) {
  if (!card) return null;
  const { meta } = card;
  const parts = [
    meta?.family,
    meta?.num_parameters &&
      t('parameters', { count: number(meta.num_parameters / 1e9, meta.num_parameters < 1e10 ? 2 : 0) }),
    meta?.dtype,
    meta?.device,
    t('context', { count: number(card.max_model_len) }),
  ];
  return h('p', { class: 'quiet' }, parts.filter(Boolean).join(' · '));
}

function field(name, control, hint) {
  const id = `field-${name}`;
  control.id = id;
  if (hint) control.setAttribute('aria-describedby', `${id}-hint`);
  return h(
    'div',
    { class: 'field' },
    h('label', { for: id }, t(`set_${name}`)),
    control,
    hint && h('p', { class: 'quiet', id: `${id}-hint` }, hint),
  );
}

function text(name, settings, set, rows) {
  const control = h('textarea', { rows, value: settings[name] ?? '', oninput: () => set(name, control.value) });
  return field(name, control, t(`hint_${name}`));
}

function numeric(name, settings, set, card) {
  const { min, max, step } = NUMBERS[name];
  const usual = card?.default_sampling_params?.[name];
  const control = h('input', {
    type: 'number',
    min,
    max,
    step: 'any',
    inputmode: step < 1 ? 'decimal' : 'numeric',
    value: settings[name] ?? '',
    placeholder: usual === undefined || usual === null ? t('auto') : String(usual),
    oninput: () => {
      const value = control.value === '' ? undefined : Number(control.value);
      const whole = step < 1 || Number.isInteger(value);
      const wrong = value !== undefined && (!Number.isFinite(value) || value < min || value > max || !whole);
      control.setCustomValidity(wrong || control.validity.badInput ? t('outOfRange', { min, max }) : '');
      control.setAttribute('aria-invalid', String(!control.validity.valid));
      if (control.validity.valid) set(name, value);
      else control.reportValidity();
    },
  });
  return field(name, control);
}

function thinking(settings, set) {
  const choices = ['auto', 'on', 'off'];
  return h(
    'fieldset',
    { class: 'choice' },
    h('legend', {}, t('set_thinking')),
    choices.map((choice) =>
      h(
        'label',
        {},
        h('input', {
          type: 'radio',
          name: 'thinking',
          value: choice,
          checked: (settings.thinking ?? 'auto') === choice,
          onchange: () => set('thinking', choice === 'auto' ? undefined : choice),
        }),
        h('span', {}, t(`thinking_${choice}`)),
      ),
    ),
    h('p', { class: 'quiet' }, t('hint_thinking')),
  );
}

function isObject(value) {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

// Only what is right is kept, so that no request is sent with half a word.
function json(name, settings, set, isRight) {
  const control = h('textarea', {
    rows: 3,
    class: 'mono',
    spellcheck: 'false',
    value: settings[name] ?? '',
    oninput: () => {
      const wrong = !jsonIs(control.value, isRight);
      control.setCustomValidity(wrong ? t('noJson') : '');
      control.setAttribute('aria-invalid', String(wrong));
      if (!wrong) set(name, control.value.trim());
    },
  });
  return field(name, control, t(`hint_${name}`));
}

function jsonIs(written, isRight) {
  if (!written.trim()) return true;
  try {
    return isRight(JSON.parse(written));
  } catch {
    return false;
  }
}
