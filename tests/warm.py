"""Processes that begin with the libraries imported.

Importing torch, transformers and TRL takes six CPU-seconds, and many tests want a process of their own: to kill it,
or because a notebook may change whatever it likes. So one process imports the libraries and does nothing else; a fork
of it is as clean as a new interpreter. mapo itself is imported by the fork, from wherever it is told.
"""
import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

LIBRARIES = ['torch', 'transformers.models.llama.modeling_llama', 'trl.trainer.dpo_trainer', 'trl.trainer.sft_trainer',
             'trl.trainer.reward_trainer', 'peft', 'datasets',
             'pandas', 'pyarrow.parquet', 'scipy.stats', 'matplotlib.backends.backend_agg',
             'matplotlib.backends.backend_svg', 'seaborn', 'math_verify', 'nbdev.test', 'execnb.shell']
LOOK = .02 # seconds between two looks at whether a process has ended


class Warm:
    "Python code in a process and a session of its own; the file `said` has what it says on both streams."
    server = None

    def __init__(self, code, *argv, said, cwd=None, **env):
        self.said = Path(said)
        self.ended = Path(f'{said}.ended')
        self.said.write_text('')
        self.ended.unlink(missing_ok=True)
        job = dict(code=code, argv=[*map(str, argv)], cwd=str(cwd or Path.cwd()),
                   env=os.environ | {k: str(v) for k, v in env.items()}, said=str(said))
        # a test may have ended all that this process had started
        if Warm.server is None or Warm.server.poll() is not None: start()
        Warm.server.stdin.write(json.dumps(job)+'\n')
        Warm.server.stdin.flush()
        self.pid = int(Warm.server.stdout.readline())

    def poll(self):
        "None while it runs; then its exit code, or minus the number of the signal that ended it."
        return int(self.ended.read_text()) if self.ended.exists() else None

    def wait(self, timeout=300):
        "Its exit code and what it said; it is killed, with its children, after `timeout` seconds."
        end = time.monotonic()+timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired('python', timeout, self.said.read_text(errors='replace')[-4000:])
            time.sleep(LOOK)
        return self.poll(), self.said.read_text(errors='replace')

    def kill(self):
        "kill -9 it and its children."
        os.killpg(self.pid, signal.SIGKILL)
        while self.poll() is None: time.sleep(LOOK)


def start():
    "Start the process that the others are forked from."
    Warm.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(stop)


def stop():
    "End it, so that its time is counted among that of the tests."
    if Warm.server: Warm.server.communicate()
    Warm.server = None


def serve():
    "Fork for every line that comes in, say the new process's number, and write down how each has ended."
    for name in LIBRARIES: importlib.import_module(name)
    gc.collect()
    gc.freeze() # so that no fork's collector walks over them
    running = {}
    while True:
        asked,_,_ = select.select([sys.stdin], [], [], LOOK if running else None)
        line = sys.stdin.readline() if asked else ''
        if asked and not line: break
        if asked:
            job = json.loads(line)
            pid = os.fork()
            if not pid: return run(**job)
            # it has done so itself and is further already
            with contextlib.suppress(PermissionError): os.setpgid(pid, pid)
            running[pid] = job['said']
            print(pid, flush=True)
        for pid in [*running]: reap(pid, running)
    for pid in running: os.killpg(pid, signal.SIGKILL)


def reap(pid, running):
    ended,status = os.waitpid(pid, os.WNOHANG)
    if not ended: return
    whole = Path(f'{running.pop(pid)}.ended')
    whole.with_suffix('.new').write_text(str(os.waitstatus_to_exitcode(status)))
    whole.with_suffix('.new').rename(whole)


def run(code, argv, cwd, env, said):
    "What the fork does."
    os.setpgid(0, 0)
    nothing,out = os.open(os.devnull, os.O_RDONLY),os.open(said, os.O_WRONLY | os.O_APPEND)
    for stream, file in enumerate((nothing, out, out)): os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:1] = ['', *filter(None, env.get('PYTHONPATH', '').split(os.pathsep))] # in the place of this file's folder
    sys.argv = ['-c', *argv]
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    exec(compile(code, '<string>', 'exec'), main.__dict__)


if __name__ == '__main__': serve()
