"""A headless Chromium, driven over its pipe with the standard library alone."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


class Browser:
  """One page of a browser of its own. `with Browser() as browser:` ends it."""

  def __init__(self, width: int = 1280, height: int = 900):
    self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    commands, self._commands = os.pipe()
    self._answers, answers = os.pipe()
    flags = ['--headless=new', '--no-sandbox', '--disable-gpu', '--remote-debugging-pipe', '--hide-scrollbars']
    # Chromium reads commands from descriptor 3 and writes answers to 4.
    wiring = f'exec {CHROMIUM} {" ".join(flags)} --user-data-dir={self._profile.name} 3<&{commands} 4>&{answers}'
    quiet = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
    self._process = subprocess.Popen(['bash', '-c', wiring], pass_fds=(commands, answers), **quiet)
    os.close(commands)
    os.close(answers)
    self._unread, self._number, self._session, self.errors = b'', 0, None, []
    page = next(target for target in self.call('Target.getTargets')['targetInfos'] if target['type'] == 'page')
    self._session = self.call('Target.attachToTarget', targetId=page['targetId'], flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log'):
      self.call(f'{domain}.enable')
    self.resize(width, height)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._process.terminate()
    self._process.wait(20)
    os.close(self._commands)
    os.close(self._answers)
    self._profile.cleanup()

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    """Returns what the DevTools protocol answers; what the page complains of meanwhile is noted in `errors`."""
    self._number += 1
    session = {'sessionId': self._session} if self._session else {}
    command = {'id': self._number, 'method': method, 'params': params, **session}
    os.write(self._commands, json.dumps(command).encode() + b'\0')
    while True:
      message = self._message()
      if message.get('id') == self._number:
        assert 'error' not in message, message
        return message['result']
      if message.get('method') in ('Runtime.exceptionThrown', 'Log.entryAdded'):
        self.errors.append(message['params'])

  def _message(self) -> dict[str, Any]:
    while b'\0' not in self._unread:
      assert select.select([self._answers], [], [], 60)[0], 'the browser does not answer'
      read = os.read(self._answers, 2**20)
      assert read, 'the browser has ended'
      self._unread += read
    message, _, self._unread = self._unread.partition(b'\0')
    return json.loads(message)

  def resize(self, width: int, height: int) -> None:
    """Sets the size of the page, in pixels."""
    self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)

  def open(self, address: str) -> None:
    """Goes to an address."""
    self.call('Page.navigate', url=address)

  def js(self, expression: str) -> Any:
    """Returns the value of a JavaScript expression."""
    found = self.call('Runtime.evaluate', expression=expression, awaitPromise=True, returnByValue=True)
    assert 'exceptionDetails' not in found, found
    return found['result'].get('value')

  def wait(self, expression: str, seconds: float = 60) -> None:
    """Waits until a JavaScript expression is true."""
    deadline = time.monotonic() + seconds
    while not self.js(f'Boolean({expression})'):
      status = "document.getElementById('status')?.textContent"
      assert time.monotonic() < deadline, f'never: {expression}; status: {self.js(status)}'
      time.sleep(0.05)

  def text(self, selector: str) -> str:
    """Returns the text of the first element that matches."""
    return self.js(f'document.querySelector({json.dumps(selector)})?.textContent ?? ""')

  def click(self, selector: str, having: str = '') -> None:
    """Clicks the first element that matches and has this text, in its middle, as a mouse does."""
    find = (
      f'[...document.querySelectorAll({json.dumps(selector)})].find(e => e.textContent.includes({json.dumps(having)}))'
    )
    self.wait(find)
    self.js(f"{find}.scrollIntoView({{block: 'center'}})")
    box = self.js(
      f'(() => {{ const b = {find}.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] }})()'
    )
    self.point(*box)
    for kind in ('mousePressed', 'mouseReleased'):
      self.call('Input.dispatchMouseEvent', type=kind, x=box[0], y=box[1], button='left', clickCount=1)

  def point(self, x: float, y: float) -> None:
    """Moves the mouse."""
    self.call('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

  def press(self, key: str) -> None:
    """Presses a key such as 'ArrowRight'."""
    codes = {'Enter': {'windowsVirtualKeyCode': 13, 'text': '\r'}}.get(key, {})
    for kind in ('keyDown', 'keyUp'):
      self.call('Input.dispatchKeyEvent', type=kind, key=key, code=key, **codes)

  def type(self, text: str) -> None:
    """Types into what has the focus."""
    self.call('Input.insertText', text=text)

  def screenshot(self, file: Path, whole: bool = False) -> None:
    """Writes a PNG of what is seen, or of the whole page."""
    size = self.call('Page.getLayoutMetrics')['cssContentSize']
    clip = {'clip': {**size, 'scale': 1}, 'captureBeyondViewport': True} if whole else {}
    file.write_bytes(base64.b64decode(self.call('Page.captureScreenshot', format='png', **clip)['data']))
