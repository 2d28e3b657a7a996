"""A headless browser: what a page says on its console, what it asks the network for, how it looks.

It speaks the DevTools protocol over a pipe, which needs no package. ``DYREP_BROWSER`` names a
Chromium or Chrome; by default one is looked for under the usual names.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')


def find_browser() -> str | None:
    """A Chromium or Chrome of this machine."""
    if named := os.environ.get('DYREP_BROWSER'):
        return shutil.which(named)
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Page:
    """An open page.

    Attributes:
        said: What errors and warnings it had.
        asked: The URLs that it asked for, but for its own and data in itself.
    """

    def __init__(self, reader: int, writer: int):
        self._reader, self._writer = os.fdopen(reader, 'rb'), os.fdopen(writer, 'wb')
        self._buffer, self._number, self._session = b'', 0, None
        self.said: list[str] = []
        self.asked: list[str] = []
        self._events: set[str] = set()
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        session = self.call('Target.attachToTarget', targetId=target, flatten=True)
        self._session = session['sessionId']
        for domain in ('Page', 'Network', 'Runtime', 'Log'):
            self.call(f'{domain}.enable')

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message = {'id': self._number, 'method': method, 'params': arguments}
        if self._session is not None:
            message['sessionId'] = self._session
        self._writer.write(json.dumps(message).encode() + b'\0')
        self._writer.flush()
        while True:
            answer = self._receive()
            if answer.get('id') == self._number:
                assert 'error' not in answer, (method, answer)
                return answer['result']

    def _receive(self) -> dict[str, Any]:
        while b'\0' not in self._buffer:
            piece = self._reader.raw.read(1 << 16)
            assert piece, 'the browser ended'
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b'\0')
        message = json.loads(text)
        self._note(message.get('method', ''), message.get('params', {}))
        return message

    def _note(self, event: str, about: dict[str, Any]) -> None:
        self._events.add(event)
        if event == 'Network.requestWillBeSent':
            url = about['request']['url']
            if not url.startswith(('data:', 'file:')):
                self.asked.append(url)
        elif event == 'Runtime.exceptionThrown':
            self.said.append(str(about['exceptionDetails']))
        elif event == 'Runtime.consoleAPICalled' and about['type'] in ('error', 'warning'):
            self.said.append(str(about['args']))
        elif event == 'Log.entryAdded' and about['entry']['level'] in ('error', 'warning'):
            self.said.append(about['entry']['text'])

    def open(self, file: Path, width: int = 1280, height: int = 900, scheme: str = 'light') -> None:
        """Open a file, and wait until it is loaded.

        Args:
            file: To open.
            width: Of the window, pixels; below 600 it is a phone.
            height: Of the window, pixels.
            scheme: ``'light'`` or ``'dark'``.
        """
        self.call(
            'Emulation.setDeviceMetricsOverride',
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{'name': 'prefers-color-scheme', 'value': scheme}]
        self.call('Emulation.setEmulatedMedia', features=features)
        self._events.clear()
        self.call('Page.navigate', url=file.resolve().as_uri())
        while 'Page.loadEventFired' not in self._events:
            self._receive()

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression."""
        result = self.call('Runtime.evaluate', expression=expression, returnByValue=True)
        assert 'exceptionDetails' not in result, result
        return result['result'].get('value')

    def screenshot(self, file: Path, top: int = 0, height: int | None = None) -> None:
        """Write a PNG of the page, or of a part of it."""
        width = self.value('innerWidth')
        height = height or self.value('document.documentElement.scrollHeight') - top
        clip = {'x': 0, 'y': top, 'width': width, 'height': height, 'scale': 1}
        answer = self.call('Page.captureScreenshot', clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer['data']))

    def print(self, file: Path) -> None:
        """Write it as a PDF, as a printer would have it."""
        file.write_bytes(base64.b64decode(self.call('Page.printToPDF')['data']))


@contextmanager
def browser() -> Iterator[Page]:
    """A page in a browser of its own."""
    to_child, writer = os.pipe()
    reader, from_child = os.pipe()

    def wire() -> None:  # the protocol has 3 and 4
        first, second = os.dup(to_child), os.dup(from_child)
        os.dup2(first, 3)
        os.dup2(second, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                find_browser(),
                *('--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars'),
                *('--no-first-run', '--disable-background-networking', '--disable-sync'),
                *('--disable-dev-shm-usage', f'--user-data-dir={profile}'),
                '--remote-debugging-pipe',
            ],
            preexec_fn=wire,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        try:
            yield Page(reader, writer)
        finally:
            process.kill()
            process.wait()
