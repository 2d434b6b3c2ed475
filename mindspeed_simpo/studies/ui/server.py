"""The server of the page: on 127.0.0.1 only, without telemetry, sharing or files."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser
from pathlib import Path

from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.studies.page import missing_extra
from mindspeed_simpo.studies.ui.guard import Guard
from mindspeed_simpo.studies.ui.root import Root

HOST = "127.0.0.1"


def serve(folder: str, port: int, *, show: bool) -> None:
    """Serve the page until a signal ends the process. Runs that it started go on.

    Args:
        folder: The root folder.
        port: Of the server; 0 takes a free one.
        show: Whether to open the page in the default browser.

    Raises:
        ConfigError: where gradio is not installed, there is no such folder, or the port is taken.
    """
    root = Root(folder)
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]  # such as GRADIO_ALLOWED_PATHS, which opens folders
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import fastapi
        import gradio
        import uvicorn
    except ImportError:
        raise ConfigError(missing_extra("ui", "gradio")) from None
    from mindspeed_simpo.studies.ui.actions import Actions
    from mindspeed_simpo.studies.ui.app import CSS, build, theme

    try:
        listener = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port: cannot listen on {HOST}:{port}: {error}; give another one") from None
    port = listener.getsockname()[1]
    actions = Actions(root)
    page = build(actions)
    page.queue(default_concurrency_limit=4, api_open=False)
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        server_name=HOST,
        server_port=port,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        blocked_paths=[str(Path(root.folder.anchor))],
        show_error=True,
        max_file_size="1kb",
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=CSS,
    )
    server = uvicorn.Server(
        uvicorn.Config(Guard(app), log_level="critical", timeout_graceful_shutdown=1, ws="none", server_header=False)
    )
    url = f"http://{HOST}:{port}"
    sys.stdout.write(f"{url}\nroot folder: {root.folder}; Ctrl-C ends the page, and runs go on\n")
    sys.stdout.flush()
    if show:
        webbrowser.open(url)
    try:
        server.run(sockets=[listener])
    finally:
        actions.close()
