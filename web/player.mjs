// The player of one node: a video that is watched while it is made, and a line that says how far it is.
// Knows streams (the server's State) and elements; nothing of graphs.

import { feed, Unplayable } from './feed.mjs'

const BEFORE_THE_END = 1 // seconds before the newest picture at which a late viewer begins

export class Player {
  constructor() {
    this.element = document.createElement('div')
    this.element.className = 'liveavatar-player'
    this.element.style.cssText = 'display:none; flex-direction:column; width:100%; height:100%; min-height:0'
    this.video = document.createElement('video')
    this.video.controls = this.video.playsInline = true
    this.video.style.cssText = 'flex:1; min-height:0; width:100%; background:black'
    this.line = document.createElement('div')
    this.line.style.cssText = 'font:12px sans-serif; padding:4px; text-align:center; color:var(--descrip-text, #999)'
    this.element.append(this.video, this.line)
    this.state = null
    this.problem = ''
    for (const kind of ['timeupdate', 'progress', 'waiting', 'playing', 'pause', 'ended'])
      this.video.addEventListener(kind, () => this.#describe())
    this.video.addEventListener('seeking', () => this.#stayInside())
  }

  get isShown() {
    return this.element.style.display !== 'none'
  }

  /** Whether there is something to see. */
  get plays() {
    return this.isShown && !this.problem && this.video.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA
  }

  /** News of a stream. The first of a new one, once there is a block to show, starts it; true if it did. */
  tell(state, { joining = false } = {}) {
    if (state.id !== this.state?.id) {
      if (!state.ready) return false
      this.release()
      this.state = state
      this.#start(joining ? Math.max(0, state.ready - BEFORE_THE_END) : 0)
      this.#describe()
      return true
    }
    this.state = state
    this.#describe()
    return false
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
    this.problem = ''
    this.video.pause()
    this.video.removeAttribute('src')
    this.video.style.display = ''
    this.video.load()
    this.element.style.display = 'none'
  }

  async #start(from) {
    const { id, total } = this.state
    const url = new URL(`/liveavatar/stream/${id}.mp4`, location.href).href
    const playing = (this.playing = new AbortController())
    this.element.style.display = 'flex'
    this.video.addEventListener('loadeddata', () => this.#play(), { once: true, signal: playing.signal })
    try {
      await feed(this.video, url, { signal: playing.signal, from, total })
    } catch (error) {
      if (playing.signal.aborted) return
      if (error instanceof Unplayable) this.#playDirectly(url, playing.signal)
      else this.#giveUp(error.message)
    }
  }

  /** As any page plays a file: it may begin late, and cannot be sought in before its end. */
  #playDirectly(url, signal) {
    this.video.addEventListener('error', () => this.#giveUp('This browser cannot play the video.'), { once: true, signal })
    this.video.src = url
  }

  /** Leave the node to its preview pictures. */
  #giveUp(problem) {
    this.problem = problem
    this.video.style.display = 'none'
    this.#describe()
  }

  /** A page that nobody has clicked in yet may only play without sound. */
  async #play() {
    try {
      await this.video.play()
    } catch (error) {
      if (error.name !== 'NotAllowedError') return
      this.video.muted = true
      await this.video.play().catch(() => {})
    }
  }

  #stayInside() {
    const { ready = 0, ended } = this.state ?? {}
    if (!ended && this.video.currentTime > ready) this.video.currentTime = Math.max(0, ready - 0.1)
  }

  #describe() {
    if (this.state) this.line.textContent = this.problem ? this.problem : describe(this.state, this.video)
  }
}

/** "1.4 of 3.0 s · made at 21.3 of 25 frames a second · 0.6 s ahead" */
function describe({ ready, total, fps, made_fps: made, late, ended }, video) {
  if (ended) return ready < total - 1 / fps ? `stopped at ${ready.toFixed(1)} of ${total.toFixed(1)} s` : `${ready.toFixed(1)} s`
  const parts = [`${ready.toFixed(1)} of ${total.toFixed(1)} s`]
  if (made) parts.push(`made at ${made.toFixed(1)} of ${fps} frames a second`)
  const ahead = Math.max(0, ready - video.currentTime)
  parts.push(ahead < 0.1 ? 'waiting for the next block' : `${ahead.toFixed(1)} s ahead`)
  if (late) parts.push(late === 1 ? '1 block late' : `${late} blocks late`)
  return parts.join(' · ')
}
