"""Measures preparing text: python benchmarks/prepare.py --train_files 'corpus/train-*.jsonl.xz' [--valid_files ...]

Runs the prepare command into an empty temporary directory and prints one table row: text read and its speed, CPU time
(which tells more than the clock where others use the machine), tokens, and the peak of the resident memory of the
command and its tokenizer processes together, sampled from /proc.
Arguments are those of mmjax.tools.prepare.
"""

import datetime
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import common  # noqa: F401 - puts the checkout on the path, here and in child processes

SAMPLE_SECONDS = 0.05


def main() -> None:
  """Prepares once and prints the row."""
  if {'-h', '--help'} & set(sys.argv):
    print(__doc__)
    return
  with tempfile.TemporaryDirectory() as out:
    command = [sys.executable, '-m', 'mmjax.tools.prepare', *sys.argv[1:], '--out', out]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = _PeakMemory(process.pid)
    directory = process.communicate()[0].strip()
    seconds = time.monotonic() - start
    if process.returncode:
      sys.exit(process.returncode)
    index = json.loads((Path(directory) / 'index.json').read_text(encoding='utf-8'))
  splits = index['splits'].values()
  text_bytes, tokens = (sum(split[key] for split in splits) for key in ('text_bytes', 'tokens'))
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  header = ('date', 'text MB', 'seconds', 'MB/s', 'CPU seconds', 'tokens', 'bytes/token', 'peak MB', 'vocab')
  sizes = f'{text_bytes / 1e6:.1f}', f'{seconds:.1f}', f'{text_bytes / 1e6 / seconds:.1f}'
  cpu = f'{usage.ru_utime + usage.ru_stime:.1f}', f'{tokens:,}', f'{text_bytes / tokens:.2f}'
  row = (datetime.date.today(), *sizes, *cpu, f'{peak.stop() / 2**20:.0f}', index['vocab_size'])
  common.print_table([dict(zip(header, row, strict=True))])


class _PeakMemory:
  """Samples the resident memory of a process and its children."""

  def __init__(self, pid: int):
    self._pid, self._peak_bytes, self._done = pid, 0, threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)  # or a command that fails would wait for it
    self._thread.start()

  def _watch(self) -> None:
    while not self._done.wait(SAMPLE_SECONDS):
      self._peak_bytes = max(self._peak_bytes, _family_bytes(self._pid))

  def stop(self) -> int:
    """Ends the sampling; returns the peak in bytes."""
    self._done.set()
    self._thread.join()
    return self._peak_bytes


def _family_bytes(parent: int) -> int:
  """Returns the resident memory of a process and its children; pages that they share count for each."""
  total = 0
  for path in Path('/proc').glob('[0-9]*/status'):
    try:
      fields = dict(line.split(':', 1) for line in path.read_text().splitlines())
    except OSError:  # the process has just ended
      continue
    if parent in (int(fields['Pid']), int(fields['PPid'])):
      total += int(fields.get('VmRSS', '0 kB').split()[0]) * 1024
  return total


if __name__ == '__main__':
  from mmjax.errors import run_command

  run_command(main)
