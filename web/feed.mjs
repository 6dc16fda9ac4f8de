// Feeds a growing fragmented mp4 from the server to a <video>, through Media Source Extensions. Knows no node.

const KEPT = 60 // seconds before the playing position that stay seekable when the browser's buffer is full

/** The browser cannot play this kind of video in this way; the message says which. */
export class Unplayable extends Error {}

/**
 * Resolves when all of the stream is in the video, rejects with Unplayable or a network error.
 * `signal` ends the feeding and lets go of the media; `from` and `total` are seconds.
 */
export async function feed(video, url, { signal, from, total }) {
  const answer = await fetch(url, { signal })
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`)
  const reader = answer.body.getReader()
  const header = await readHeader(reader)
  const type = mediaType(header)
  if (!window.MediaSource?.isTypeSupported(type)) {
    await reader.cancel()
    throw new Unplayable(`This browser does not play ${type}.`)
  }
  try {
    const { source, track } = await openSource(video, type, total, signal)
    video.currentTime = from
    for (let data = header; data; data = (await reader.read()).value) await append(track, data, video, signal)
    source.endOfStream()
  } finally {
    await reader.cancel()
  }
}

/** The stream's bytes until its description (moov) is complete, and what came along. */
async function readHeader(reader) {
  let bytes = new Uint8Array(0)
  for (;;) {
    const { value, done } = await reader.read()
    if (done) throw new Error('it ended before its first picture')
    const joined = new Uint8Array(bytes.length + value.length)
    joined.set(bytes)
    joined.set(value, bytes.length)
    bytes = joined
    const view = new DataView(bytes.buffer)
    for (let at = 0; at + 8 <= bytes.length; at += view.getUint32(at)) {
      const end = at + view.getUint32(at)
      if (find(bytes.subarray(at, at + 8), 'moov') === 4 && end <= bytes.length) return bytes
      if (end <= at) throw new Error('it is no mp4')
    }
  }
}

/** As isTypeSupported wants it: H.264's profile stands in its avcC box, and there is AAC-LC or no sound. */
function mediaType(header) {
  const at = find(header, 'avcC') + 5 // after the name and the version
  const profile = [...header.subarray(at, at + 3)].map((byte) => byte.toString(16).padStart(2, '0')).join('')
  const sound = find(header, 'mp4a') < 0 ? '' : ', mp4a.40.2'
  return `video/mp4; codecs="avc1.${profile}${sound}"`
}

function find(bytes, name) {
  const wanted = [...name].map((letter) => letter.charCodeAt(0))
  for (let at = 0; at + 4 <= bytes.length; at++) if (wanted.every((code, i) => bytes[at + i] === code)) return at
  return -1
}

/** The host may forbid this way of playing (a page without outside connections does); the video then reports an error. */
async function openSource(video, type, total, signal) {
  const source = new MediaSource()
  const address = URL.createObjectURL(source)
  const opened = new Promise((resolve, reject) => {
    source.addEventListener('sourceopen', resolve, { once: true })
    video.addEventListener('error', () => reject(new Unplayable('The page may not play what it is fed.')), { once: true, signal })
    signal.addEventListener('abort', () => reject(signal.reason), { once: true })
  })
  video.src = address
  try {
    await opened
  } finally {
    URL.revokeObjectURL(address) // the video holds the source itself by now
  }
  source.duration = total
  return { source, track: source.addSourceBuffer(type) }
}

async function append(track, data, video, signal) {
  for (;;) {
    signal.throwIfAborted()
    try {
      track.appendBuffer(data)
      return await settled(track)
    } catch (error) {
      if (error.name !== 'QuotaExceededError') throw error
    }
    const old = video.currentTime - KEPT
    if (track.buffered.length && old > track.buffered.start(0)) {
      track.remove(0, old)
      await settled(track)
    } else {
      await new Promise((done) => setTimeout(done, 500)) // until more of it has been played
    }
  }
}

function settled(track) {
  return new Promise((resolve, reject) => {
    track.addEventListener('updateend', resolve, { once: true })
    track.addEventListener('error', () => reject(new Unplayable('The browser cannot read the stream.')), { once: true })
  })
}
