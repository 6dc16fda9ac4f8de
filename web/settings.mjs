// The pack's part of the host's settings page. What the server does with them is in nodes/settings.py.

const CATEGORY = 'Live Avatar'

export const LIVE_PLAYER = 'LiveAvatar.LivePlayer'

export const settings = [
  {
    id: LIVE_PLAYER,
    category: [CATEGORY, 'Video', 'LivePlayer'],
    name: 'Play the video in its node while it is made',
    tooltip: 'With sound, from the first block on. Off: preview pictures, and the video when it is finished.',
    type: 'boolean',
    defaultValue: true,
  },
  {
    id: 'LiveAvatar.PreviewPictures',
    category: [CATEGORY, 'Video', 'PreviewPictures'],
    name: 'Preview picture after each block',
    tooltip: 'Shown where the video does not play. Small spares a slow connection. From the next run on.',
    type: 'combo',
    options: ['full size', 'small', 'none'],
    defaultValue: 'full size',
  },
  {
    id: 'LiveAvatar.CacheGiB',
    category: [CATEGORY, 'Machine', 'CacheGiB'],
    name: 'Finished latents kept on disk (GiB)',
    tooltip: 'For decoding again without sampling again, in the temporary folder of ComfyUI, which --temp-directory moves. The last video is always kept.',
    type: 'number',
    attrs: { min: 0, max: 1000, showButtons: true },
    defaultValue: 4,
  },
  {
    id: 'LiveAvatar.Devices',
    category: [CATEGORY, 'Machine', 'Devices'],
    name: 'Devices used for auto',
    tooltip: 'Where a Runtime node says auto, or there is none: auto (the one ComfyUI uses), all, or names like cuda:0, cuda:1.',
    type: 'text',
    defaultValue: 'auto',
  },
]
