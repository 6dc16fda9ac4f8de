// The buttons that pause, resume and stop a run between two blocks. Knows the server's routes and nothing of graphs.

import { say } from './words.mjs'

export class Hold {
  constructor() {
    this.element = document.createElement('span')
    this.element.className = 'liveavatar-hold'
    this.element.style.cssText = 'display:none; gap:8px'
    this.pause = this.#button(() => (this.state.paused ? 'resume' : 'pause'))
    this.stop = this.#button(() => 'stop')
  }

  /** `state`: id, paused and ended of a run; null: of none. */
  tell(state) {
    this.state = state
    this.element.style.display = state && !state.ended ? 'inline-flex' : 'none'
    if (state?.paused) label(this.pause, 'pi pi-play', say('Go on making the video'))
    else label(this.pause, 'pi pi-pause', say('Pause making the video after this block'))
    label(this.stop, 'pi pi-stop', say('Stop after this block and keep the video'))
  }

  #button(action) {
    const button = document.createElement('button')
    button.type = 'button'
    button.style.cssText = 'all:unset; cursor:pointer; padding:2px 4px; line-height:1'
    button.addEventListener('click', () => {
      const url = new URL(`/liveavatar/stream/${this.state.id}/${action()}`, location.href)
      fetch(url, { method: 'POST' }).catch(() => {}) // the server is gone, which the page says by itself
    })
    button.append(document.createElement('i'))
    this.element.append(button)
    return button
  }
}

function label(button, icon, text) {
  button.firstChild.className = icon
  button.title = button.ariaLabel = text
}
