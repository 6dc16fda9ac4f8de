// The player of one node: a video that is watched while it is made, and a line that says how far it is.
// Knows streams (the server's State) and elements; nothing of graphs.

import { feed, Unplayable } from './feed.mjs'
import { Hold } from './hold.mjs'
import { say } from './words.mjs'

const BEFORE_THE_END = 1 // seconds before the newest picture, for who comes late or seeks beyond it

export class Player {
  /** `onShown(whether)` hears when it appears and disappears. */
  constructor(onShown) {
    this.onShown = onShown
    this.element = document.createElement('div')
    this.element.className = 'liveavatar-player'
    this.element.style.cssText = 'display:none; flex-direction:column; width:100%; height:100%; min-height:0'
    this.video = document.createElement('video')
    this.video.controls = this.video.playsInline = true // with mute and full screen
    this.video.setAttribute('controlslist', 'nodownload') // which cannot save what it is fed
    // Vue nodes give a widget no more than it asks for and a share of the rest.
    this.video.style.cssText = 'flex:1 1 0; height:0; min-height:160px; width:100%; background:black'
    this.bar = document.createElement('div')
    this.bar.style.cssText =
      'display:flex; gap:12px; align-items:center; padding:4px; font:12px sans-serif; color:var(--descrip-text, #999)'
    this.line = document.createElement('span')
    this.line.className = 'liveavatar-line'
    this.line.style.cssText = 'flex:1; text-align:center'
    this.save = document.createElement('a')
    this.save.className = 'pi pi-download'
    this.save.title = say('Save the video as far as it is')
    this.save.style.cssText = 'color:inherit; text-decoration:none; cursor:pointer'
    this.hold = new Hold()
    this.bar.append(this.hold.element, this.line, this.save)
    this.element.append(this.video, this.bar)
    this.state = null
    this.direct = false // the video loads the stream by itself, and may begin late
    this.problem = ''
    this.video.addEventListener('ended', () => this.#knowEnd())
    for (const kind of ['timeupdate', 'progress', 'waiting', 'playing', 'pause', 'ended'])
      this.video.addEventListener(kind, () => this.#describe())
    this.video.addEventListener('seeking', () => this.#stayInside())
  }

  get isShown() {
    return this.element.style.display !== 'none'
  }

  set isShown(shown) {
    if (shown === this.isShown) return
    this.element.style.display = shown ? 'flex' : 'none'
    this.onShown(shown)
  }

  /** Whether there is something to see. */
  get plays() {
    return this.isShown && this.video.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA
  }

  /** Whether preview pictures are not needed: the video is there, or will be in a moment. */
  get replacesPreviews() {
    return this.plays || (this.isShown && !this.direct && !this.problem)
  }

  /** News of a stream. The first of a new one, once there is a block to show, starts it. */
  tell(state, { joining = false } = {}) {
    if (state.id === this.state?.id) {
      if (!this.state.ended) this.state = state // else it is older than what the video said
    } else if (state.ready) {
      this.release()
      this.state = state
      this.#start(joining ? newest(state) : 0)
    }
    this.#describe()
  }

  /** The finished video has appeared elsewhere: leave once this one, if it has begun, has been seen to its end. */
  giveWay() {
    if (!this.playing) return
    if (this.video.ended || !this.plays) this.release()
    else this.video.addEventListener('ended', () => this.release(), { once: true, signal: this.playing.signal })
  }

  /** Stop, and let go of everything that is held for the stream. */
  release() {
    this.playing?.abort()
    this.playing = null
    this.state = null
    this.direct = false
    this.problem = ''
    this.video.pause()
    this.video.removeAttribute('src')
    this.video.style.display = ''
    this.video.load()
    this.isShown = false
  }

  async #start(from) {
    const { id, file, total } = this.state
    const url = new URL(`/liveavatar/stream/${id}.mp4`, location.href).href
    const playing = (this.playing = new AbortController())
    this.save.href = `${url}?so_far`
    this.save.download = file
    this.isShown = true
    this.video.addEventListener('loadeddata', () => this.#play(), { once: true, signal: playing.signal })
    try {
      await feed(this.video, url, { signal: playing.signal, from, total })
      this.#knowEnd()
    } catch (error) {
      if (playing.signal.aborted) return
      if (error instanceof Unplayable) this.#playDirectly(url, playing.signal)
      else this.#giveUp(say('The stream broke off: {reason}', { reason: error.message }))
    }
  }

  /** As any page plays a file: it may begin late, and cannot be sought in before its end. */
  #playDirectly(url, signal) {
    this.direct = true
    this.video.addEventListener('error', () => this.#giveUp(say('This browser cannot play the video.')), { once: true, signal })
    this.video.src = url
  }

  /** Leave the node to its preview pictures, unless a part of the video is there. */
  #giveUp(problem) {
    this.problem = problem
    if (!this.plays) this.video.style.display = 'none'
    this.#describe()
  }

  /** The video itself says that nothing more comes; the server's word may be late, or lost with its connection. */
  #knowEnd() {
    if (this.state) this.state = { ...this.state, ready: Math.min(this.state.total, this.video.duration), ended: true }
    this.#describe()
  }

  /** A page that nobody has clicked in yet may only play without sound; and nobody is to hear what they cannot see, as
   *  of a node inside a subgraph. */
  async #play() {
    if (!this.element.checkVisibility()) this.video.muted = true
    try {
      await this.video.play()
    } catch (error) {
      if (error.name !== 'NotAllowedError') return
      this.video.muted = true
      await this.video.play().catch(() => {})
    }
  }

  #stayInside() {
    if (this.state?.ended === false && this.video.currentTime > this.state.ready) this.video.currentTime = newest(this.state)
  }

  #describe() {
    this.hold.tell(this.state)
    if (this.state) this.line.textContent = this.problem ? this.problem : describe(this.state, this.video)
  }
}

function newest({ ready }) {
  return Math.max(0, ready - BEFORE_THE_END)
}

/** "1.4 of 3.0 s · made at 21.3 of 25 frames a second · 0.6 s ahead" */
function describe({ ready, total, fps, made_fps: made, late, paused, ended }, video) {
  const seconds = { ready: ready.toFixed(1), total: total.toFixed(1) }
  if (ended && ready < total - 1 / fps) return say('stopped at {ready} of {total} s', seconds)
  if (ended) return say('{ready} s', seconds)
  const parts = [say('{ready} of {total} s', seconds)]
  if (made) parts.push(say('made at {made} of {fps} frames a second', { made: made.toFixed(1), fps }))
  const ahead = Math.max(0, ready - video.currentTime)
  if (ahead >= 0.1) parts.push(say('{ahead} s ahead', { ahead: ahead.toFixed(1) }))
  else if (!paused) parts.push(say('waiting for the next block'))
  if (paused) parts.push(say('paused'))
  if (late) parts.push(late === 1 ? say('1 block late') : say('{late} blocks late', { late }))
  return parts.join(' · ')
}
