// Runs in a page before anything else in it: notes what becomes of the player's video in `seen`. Changes nothing.

window.seen = { begun: null, end: null, addresses: new Set(), made: 0, frames: [], sounds: [] }

{
  const { createObjectURL, revokeObjectURL } = URL
  URL.createObjectURL = (thing) => {
    const address = createObjectURL.call(URL, thing)
    if (thing instanceof MediaSource) seen.addresses.add(address) && seen.made++
    return address
  }
  URL.revokeObjectURL = (address) => {
    seen.addresses.delete(address)
    revokeObjectURL.call(URL, address)
  }

  new MutationObserver(() => {
    const video = document.querySelector('.liveavatar-player video')
    if (!video || video === seen.video) return
    seen.video = video
    video.addEventListener('playing', () => (seen.begun ??= state(video)))
    video.addEventListener('ended', () => (seen.end ??= state(video)))
  }).observe(document, { subtree: true, childList: true })

  const state = (video) => ({
    clock: performance.now(),
    time: video.currentTime,
    duration: video.duration,
    buffered: [...Array(video.buffered.length).keys()].map((i) => [video.buffered.start(i), video.buffered.end(i)]),
    frames: video.getVideoPlaybackQuality().totalVideoFrames,
    sound: video.webkitAudioDecodedByteCount,
    fed: video.src.startsWith('blob:'),
    line: seen.line(),
  })
  seen.line = () => document.querySelector('.liveavatar-line')?.textContent
}

/** When each picture is shown, and when each sound leaves the video, by the page's clock in ms. */
seen.watchClaps = async () => {
  const { video, frames, sounds } = seen
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true })
  const look = (_, { expectedDisplayTime, mediaTime }) => {
    canvas.drawImage(video, 0, 0, 1, 1)
    frames.push({ shown: expectedDisplayTime, at: mediaTime, white: canvas.getImageData(0, 0, 1, 1).data[0] > 128 })
    video.requestVideoFrameCallback(look)
  }
  video.requestVideoFrameCallback(look)

  const context = new AudioContext()
  const onset = `registerProcessor('onset', class extends AudioWorkletProcessor {
    last = -1
    process([[samples]]) {
      const first = samples?.findIndex((sample) => Math.abs(sample) > 0.2) ?? -1
      if (first >= 0) {
        const now = currentTime + first / sampleRate
        if (now - this.last > 0.3) this.port.postMessage(now)
        this.last = now
      }
      return true
    }
  })`
  await context.audioWorklet.addModule(URL.createObjectURL(new Blob([onset], { type: 'text/javascript' })))
  const node = new AudioWorkletNode(context, 'onset')
  node.port.onmessage = ({ data }) => {
    const { contextTime, performanceTime } = context.getOutputTimestamp()
    const late = context.baseLatency + context.outputLatency // which this way of listening adds after the video
    sounds.push(performanceTime + (data - contextTime - late) * 1000)
  }
  context.createMediaElementSource(video).connect(node).connect(context.destination)
}
