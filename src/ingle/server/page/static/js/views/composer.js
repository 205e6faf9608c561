// Where messages are written. What is written outlasts a reload.

import { announce } from '../announce.js';
import { h, icon } from '../dom.js';
import { read, readOnce, writeOnce } from '../prefs.js';
import { t } from '../words.js';

const touchOnly = matchMedia('(hover: none) and (pointer: coarse)');

// `send` gets the text and says whether it took it; `isBusy` whether an answer runs; `editLast` is for the arrow up.
export class Composer {
  constructor({ key, placeholder, send, stop, isBusy, editLast }) {
    this.key = `draft.${key}`;
    this.act = { send, stop, isBusy, editLast };
    this.field = h('textarea', {
      rows: '1',
      placeholder,
      'aria-label': placeholder,
      'aria-describedby': 'composer-hint',
      autocomplete: 'off',
      value: readOnce(this.key) ?? '',
    });
    this.button = h('button', { type: 'submit', class: 'send' }, icon('send'));
    this.hint = h('p', { class: 'hint', id: 'composer-hint' }, this.hintText());
    this.element = h(
      'form',
      {
        class: 'composer',
        onsubmit: (event) => {
          event.preventDefault();
          this.submit();
        },
      },
      h('div', { class: 'composer-box' }, this.field, this.button),
      this.hint,
    );
    this.field.addEventListener('input', () => this.changed());
    this.field.addEventListener('keydown', (event) => this.typed(event));
    this.refresh();
    queueMicrotask(() => this.grow());
  }

  hintText() {
    if (touchOnly.matches) return t('hintTouch');
    return t(read('enter', 'send') === 'send' ? 'hintEnter' : 'hintCtrlEnter');
  }

  changed() {
    writeOnce(this.key, this.field.value || null);
    this.grow();
    this.refresh();
  }

  grow() {
    this.field.style.height = 'auto';
    this.field.style.height = `${this.field.scrollHeight}px`;
  }

  // The button stops an answer that runs, and else sends what is written.
  refresh() {
    const busy = this.act.isBusy();
    const label = t(busy ? 'stop' : 'send');
    this.button.setAttribute('aria-label', label);
    this.button.title = label;
    this.button.classList.toggle('busy', busy);
    this.button.replaceChildren(icon(busy ? 'stop' : 'send'));
    this.button.disabled = !busy && !this.field.value.trim();
  }

  // An Enter that ends the choice of a Chinese or Japanese word sends nothing; 229 is how some browsers tell it.
  typed(event) {
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === 'ArrowUp' && !this.field.value) {
      event.preventDefault();
      this.act.editLast?.();
    }
    if (event.key !== 'Enter' || event.shiftKey || event.altKey) return;
    const withControl = event.ctrlKey || event.metaKey;
    const sends = withControl || (read('enter', 'send') === 'send' && !touchOnly.matches);
    if (!sends) return;
    event.preventDefault();
    if (this.act.isBusy()) announce(t('stillAnswers'));
    else this.submit();
  }

  submit() {
    if (this.act.isBusy()) {
      this.act.stop();
      return;
    }
    const text = this.field.value;
    if (!text.trim() || !this.act.send(text)) return;
    this.field.value = '';
    this.changed();
  }

  // From now on what is written is a draft of the conversation of that key.
  belongTo(key) {
    this.key = `draft.${key}`;
  }

  write(text) {
    this.field.value = text;
    this.changed();
    this.field.focus();
  }

  focus() {
    this.field.focus({ preventScroll: true });
  }
}
