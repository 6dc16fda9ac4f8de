"""ComfyUI over HTTP and websocket, for programs and terminals: `python -m liveavatar_core.client --help`.

`connection` talks to a server (needs aiohttp, as ComfyUI does), `workflow` reads and changes workflows in API form.
"""
