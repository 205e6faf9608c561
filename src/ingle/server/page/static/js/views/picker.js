// Which model answers, and a button for how.

import * as chats from '../chats.js';
import { h, iconButton } from '../dom.js';
import { models, onModels } from '../models.js';
import { t } from '../words.js';
import { showSettings } from './settings.js';

export function picker(conversation, { label = t('model'), common = true } = {}) {
  const select = h('select', { 'aria-label': label, onchange: () => choose(select.value) });
  const keep = () => {
    if (common) chats.keepSettings(conversation.settings);
  };
  const choose = (name) => {
    conversation.settings.model = name;
    keep();
    chats.touched(conversation);
  };
  const draw = () => {
    const { settings } = conversation;
    const names = models.cards.map((card) => card.id);
    if (names.length && !names.includes(settings.model)) settings.model = names[0];
    select.disabled = !names.length;
    select.replaceChildren(
      ...(names.length ? names : [t(`models_${models.state}`)]).map((name) => h('option', { value: name }, name)),
    );
    if (names.length) select.value = settings.model;
  };
  const button = iconButton('sliders', t('settings'), () => showSettings(conversation, keep), {
    'aria-haspopup': 'dialog',
  });
  const stop = onModels(draw);
  draw();
  return { element: h('div', { class: 'picker' }, select, button), open: () => button.click(), close: stop };
}
