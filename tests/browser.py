"A headless Chromium that shows pages as readers see them, at a width, light or dark, and notes what a page asks for."
import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ['chromium', 'chromium-browser', 'google-chrome', 'chrome']
FLAGS = ['--headless=new', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--remote-debugging-port=0',
         '--no-first-run', '--disable-dev-shm-usage', '--disable-extensions', '--disable-background-networking',
         '--disable-component-update']


def installed():
    "The path of a Chromium, or None."
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    "One tab of a Chromium of its own; a context manager, so that no process is left behind."
    def __init__(self, folder):
        self.folder = Path(folder)
        self.counter = itertools.count(1)
        self.asked = [] # the addresses that the page at hand has asked for

    def __enter__(self):
        from websocket import create_connection
        self.process = subprocess.Popen([installed(), *FLAGS, f'--user-data-dir={self.folder}', 'about:blank'],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port, path = self.address()
        self.socket = create_connection(f'ws://127.0.0.1:{port}{path}', suppress_origin=True, timeout=30)
        self.session = None
        tab = self.call('Target.createTarget', url='about:blank')['targetId']
        self.session = self.call('Target.attachToTarget', targetId=tab, flatten=True)['sessionId']
        for domain in ('Page', 'Network', 'Runtime'): self.call(f'{domain}.enable')
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.process.kill()
        self.process.wait()

    def address(self):
        "The port and path that Chromium writes down once it listens."
        file, end = self.folder/'DevToolsActivePort', time.monotonic()+30
        while not (file.exists() and len(file.read_text().split()) == 2):
            if time.monotonic() > end or self.process.poll() is not None: raise RuntimeError('Chromium does not start')
            time.sleep(.05)
        return file.read_text().split()

    def call(self, method, **params):
        "Ask Chromium for something and return its answer."
        number = next(self.counter)
        whose = {'sessionId': self.session} if self.session else {}
        self.socket.send(json.dumps({'id': number, 'method': method, 'params': params} | whose))
        while (message := self.received()).get('id') != number: pass
        if 'error' in message: raise RuntimeError(f'{method}: {message["error"]["message"]}')
        return message['result']

    def received(self):
        message = json.loads(self.socket.recv())
        if message.get('method') == 'Network.requestWillBeSent': self.asked.append(message['params']['request']['url'])
        return message

    def show(self, page, width, dark=False, height=900):
        "Open a page (a file) and wait until it is loaded and drawn."
        phone, scheme = width < 600, {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call('Emulation.setEmulatedMedia', features=[scheme])
        self.asked.clear()
        self.call('Page.navigate', url=Path(page).resolve().as_uri() if not str(page).startswith('file:') else page)
        while self.received().get('method') != 'Page.loadEventFired': pass
        self.run('new Promise(done => requestAnimationFrame(() => setTimeout(done, 80)))')

    def run(self, script):
        "The value of a JavaScript expression on the page."
        done = self.call('Runtime.evaluate', expression=script, awaitPromise=True, returnByValue=True)
        if 'exceptionDetails' in done: raise RuntimeError(done['exceptionDetails']['exception'].get('description'))
        return done['result'].get('value')

    def picture(self, file, height=None):
        "Save what the page looks like, as PNG: the window, or the first `height` pixels of the page."
        clip = dict(x=0, y=0, width=self.run('innerWidth'), height=height, scale=1)
        area = {} if height is None else {'captureBeyondViewport': True, 'clip': clip}
        Path(file).write_bytes(base64.b64decode(self.call('Page.captureScreenshot', format='png', **area)['data']))
