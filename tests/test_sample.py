"""The sample command: prompts from the command line and from stdin, hostile ones too, and a terminal left in order."""

import io
import sys

import pytest

import mmjax
from mmjax.console import printable
from mmjax.inference.api import LanguageModel
from mmjax.tools import sample
from tests.helpers import run_main

FLAGS = ['--max_new_tokens', '12', '--seed', '4']


def run_sample(monkeypatch, capfd, *flags: str, stdin: bytes = b'') -> tuple[int, str, str]:
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin), 'utf-8'))
  return run_main(sample.main, monkeypatch, capfd, *flags)


def test_a_prompt_is_continued_as_the_api_does(tiny_run, monkeypatch, capfd):
  code, out, _ = run_sample(monkeypatch, capfd, '--workdir', str(tiny_run), '--prompt', 'the memory', *FLAGS)
  assert code == 0
  [want] = mmjax.load(tiny_run).generate('the memory', max_new_tokens=12, seed=4)
  assert out == printable(want) + '\n'


@pytest.mark.thorough
def test_prompts_are_continued_one_after_the_other(tiny_run, monkeypatch, capfd):
  code, out, _ = run_sample(
    monkeypatch, capfd, '--workdir', str(tiny_run), '--prompt', 'the memory', '--prompt', 'b', *FLAGS
  )
  lm = mmjax.load(tiny_run)
  wants = {
    prompt: lm.generate(prompt, max_new_tokens=12, seed=seed)[0] for seed, prompt in ((4, 'the memory'), (5, 'b'))
  }
  assert (code, out) == (0, ''.join(f"'{prompt}':\n{printable(want)}\n" for prompt, want in wants.items()))


def test_a_prompt_needs_no_stdin(tiny_run, monkeypatch, capfd):
  monkeypatch.setattr(sample, 'write_continuation', lambda lm, prompt, sampling: print(prompt))
  monkeypatch.setattr(sys, 'argv', ['sample', '--workdir', str(tiny_run), '--prompt', 'a'])
  monkeypatch.setattr(sys, 'stdin', None)
  sample.main()
  assert capfd.readouterr().out == 'a\n'


def test_a_text_that_ends_at_once_is_told(tiny_run, monkeypatch, capfd):
  monkeypatch.setattr(LanguageModel, '_pieces', lambda lm, tokens, sampling: iter(()))
  code, out, err = run_sample(monkeypatch, capfd, '--workdir', str(tiny_run), '--prompt', 'the memory')
  assert (code, out) == (0, '\n') and 'wrote no text' in err


@pytest.mark.thorough
def test_lines_of_stdin_are_prompts_and_a_bad_one_does_not_end_it(tiny_run, monkeypatch, capfd):
  stdin = b'the memory\n\xff\xfe\nthe memory\n\n\x1b[2J\x00\n'
  code, out, err = run_sample(monkeypatch, capfd, '--workdir', str(tiny_run), *FLAGS, stdin=stdin)
  assert code == 2
  assert 'prompt 2: the text holds byte 0xff, which is not UTF-8, at character 0' in err and 'Traceback' not in err
  assert err.endswith('prompts refused: 1 of 5\n')
  lm = mmjax.load(tiny_run)
  prompts = {0: 'the memory', 2: 'the memory', 3: '', 4: '\x1b[2J\x00'}  # by number, which the seed goes with
  wants = [lm.generate(prompt, max_new_tokens=12, seed=4 + number)[0] for number, prompt in prompts.items()]
  wants.insert(1, '')
  assert out == ''.join(printable(want) + '\n' for want in wants)
  assert wants[0] != wants[2]


def test_only_the_end_of_a_line_ends_a_prompt(tiny_run, monkeypatch, capfd):
  prompts = []
  monkeypatch.setattr(sample, 'write_continuation', lambda lm, prompt, sampling: prompts.append(prompt))
  stdin = 'a\u2028b\x85c\x0cd\re\x1cf\r\nsecond\n'.encode()
  assert run_sample(monkeypatch, capfd, '--workdir', str(tiny_run), stdin=stdin)[0] == 0
  assert prompts == ['a\u2028b\x85c\x0cd\re\x1cf', 'second']


@pytest.mark.thorough
def test_ten_megabytes_are_answered(tiny_run, monkeypatch, capfd):
  stdin = b'the memory reads ' * 600_000 + b'\n'
  code, out, err = run_sample(monkeypatch, capfd, '--workdir', str(tiny_run), *FLAGS, stdin=stdin)
  assert code == 0
  said = [line for line in err.splitlines() if 'cpu_aot_loader' not in line]  # XLA's, of programs that it finds again
  assert said[0] == (
    "Note: the prompt that begins with 'the memory reads the memory reads the me' is longer than "
    'model.max_seq_len=16 tokens; its end is used'
  )
  assert [line.split(' ', 2)[2] for line in said[1:]] == [
    'tokens are more than model.max_seq_len=16, up to which the model was trained'
  ]
  assert out.endswith('\n') and len(out) > 1


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--workdir', 'no/such/run'], 'no run directory no/such/run'),
    (['--temperature', '-1'], 'temperature=-1.0 must be'),
    (['--checkpoint', 'newest'], "checkpoint='newest' must be"),
    (['--prompt', 'a\udcff'], 'byte 0xff, which is not UTF-8, at character 1'),
  ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tiny_run, monkeypatch, capfd, flags, said):
  code, out, err = run_sample(monkeypatch, capfd, '--workdir', str(tiny_run), *FLAGS, *flags)
  assert (code, out) == (2, '')
  assert said in err
  assert err.count('\n') == 1


def test_ctrl_c_ends_one_text_and_then_the_session(tiny_run, monkeypatch, capfd):
  def interrupted(lm, prompt, sampling):
    print('half a te', end='')
    if prompt == 'long':
      raise KeyboardInterrupt
    print('xt')

  monkeypatch.setattr(sample, 'write_continuation', interrupted)
  code, out, _ = run_sample(monkeypatch, capfd, '--workdir', str(tiny_run), stdin=b'long\nshort\n')
  assert (code, out) == (0, 'half a te\nhalf a text\n')

  lines = iter(['short', KeyboardInterrupt])
  monkeypatch.setattr('builtins.input', lambda _: raise_or_return(next(lines)))
  code, out, _ = run_sample(monkeypatch, capfd, '--workdir', str(tiny_run))
  assert (code, out) == (0, 'half a text\n')


def raise_or_return(line):
  if line is KeyboardInterrupt:
    raise KeyboardInterrupt
  return line


def test_of_several_prompts_the_refused_one_is_named(tiny_run, monkeypatch, capfd):
  prompts = ['--prompt', 'the memory', '--prompt', 'a\udcff']
  code, out, err = run_sample(monkeypatch, capfd, '--workdir', str(tiny_run), *FLAGS, *prompts)
  assert code == 2 and out.endswith('\n') and 'Traceback' not in err
  assert err.splitlines()[-1].startswith('prompt 2: the text holds byte 0xff')


def test_control_characters_are_escaped_and_text_is_not():
  assert printable('a\tb\nc \x1b[31m\x07\x00\x7f\x9b\r') == 'a\tb\nc \\x1b[31m\\x07\\x00\\x7f\\x9b\\r'
  assert printable('\u202eevil\u2066\u2028') == '\\u202eevil\\u2066\\u2028'
  assert printable('Ἀπόλλων ˈrænd 漢字 🙂👩\u200d🚀\ufffd') == 'Ἀπόλλων ˈrænd 漢字 🙂👩\u200d🚀\ufffd'


@pytest.mark.thorough
def test_notes_come_after_the_text(tiny_run, monkeypatch, capfd):
  monkeypatch.setattr(sys, 'stderr', sys.stdout)  # as on a terminal
  flags = ['--prompt', 'the memory reads', '--max_new_tokens', '30', '--temperature', '0']
  code, out, _ = run_sample(monkeypatch, capfd, '--workdir', str(tiny_run), *flags)
  assert code == 0 and out.splitlines()[-1].startswith('Note: ')
