"""The table of parameters: rates and decays from a config alone against optax by hand, and rules that say nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax.config import load_config
from mmjax.config.optimizers import OPTIMIZERS, Optimizer
from mmjax.config.parameters import Rule, first_rule, parameter_table, read_rules
from mmjax.config.rules import CHOICES
from mmjax.errors import UserError
from mmjax.files import path_name
from mmjax.model.params import abstract_params
from mmjax.training.optimizer import bank_rate, check_parameters, learning_rate_schedule, make_optimizer, may_overflow
from tests.helpers import tiny_config

STEPS = 4
BAG = {'model__sublayer': 'memory_bag', 'memory__bank_lr_multiplier': 16.0, 'memory__bank_decay_multiplier': 0.5}
TABLE = (
  r'embedding lr=4 beta1=0.5; layers/1/.*gate lr=0.5 decay=0; bank lr=3..1 beta1=0.75 beta2=0.95; norm/scale$ decay=2; '
  'layers/.* lr=0.25'
)


def test_rules_are_read_and_the_first_that_says_it_counts():
  rules = read_rules(' a/.* lr=2 ;b decay=0 lr=16..1;; ')
  assert rules == (Rule('a/.*', 2.0), Rule('b', (16.0, 1.0), 0.0))
  assert first_rule(rules, 'a/b', 'lr') is rules[0] and first_rule(rules, 'a/b', 'decay') is rules[1]
  assert first_rule(rules, 'c', 'lr') is None
  config = tiny_config(**BAG, train__embedding_lr_multiplier=2.0)
  rates = {name: first_rule(parameter_table(config), name, 'lr') for name in ('embedding', 'memory_bank', 'norm/scale')}
  assert [rule and rule.rates for rule in rates.values()] == [(2.0, 2.0), (16.0, 1.0), None]


def by_hand(name: str, count: int) -> tuple[float, float]:
  """Rate and decay of a parameter over everyone's by TABLE and BAG."""
  rate = decay = 1.0
  if re.search('embedding', name):
    rate = 4.0
  elif re.search('layers/1/.*gate', name):
    rate = 0.5
  elif name == 'memory_bank':
    rate = 3 - 2 * count / (STEPS - 1)
  elif name.startswith('layers/'):
    rate = 0.25
  if re.search('layers/1/.*gate', name):
    decay = 0.0
  elif name.endswith('norm/scale'):
    decay = 2.0
  elif name == 'memory_bank':
    decay = 0.5
  return rate, decay


def betas_by_hand(name: str) -> tuple[float, float]:
  """Of a parameter by TABLE."""
  return {'embedding': (0.5, 0.999), 'memory_bank': (0.75, 0.95)}.get(name, (0.9, 0.999))


def test_rates_decays_and_betas_of_groups_from_a_config_equal_optax_by_hand():
  config = tiny_config(**BAG | {'memory__bank_lr_multiplier': 1.0}, train__parameters=TABLE, train__weight_decay=0.2)
  train = config.train
  leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract_params(config))
  names, rng = [path_name(path) for path, _ in leaves], np.random.default_rng(0)
  draw = lambda: [jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) for _, leaf in leaves]  # noqa: E731
  params, gradients = draw(), [draw() for _ in range(STEPS)]
  optimizer, everyones = make_optimizer(config, STEPS), learning_rate_schedule(train, STEPS)
  got = jax.tree.unflatten(treedef, params)
  state = optimizer.init(got)
  own = {name: optax.scale_by_adam(*betas_by_hand(name), train.eps) for name in names}
  adam = optax.chain(optax.clip_by_global_norm(train.grad_clip), optax.multi_transform(own, names))
  adam_state = adam.init(params)
  update, step = jax.jit(optimizer.update), jax.jit(adam.update)
  for count, gradient in enumerate(gradients):
    updates, state = update(jax.tree.unflatten(treedef, gradient), state, got)
    got = optax.apply_updates(got, updates)
    steps, adam_state = step(gradient, adam_state)
    for i, name in enumerate(names):
      rate, decay = by_hand(name, count)
      rate *= float(everyones(count))
      params[i] -= rate * (steps[i] + train.weight_decay * decay * params[i])
  for name, a, b in zip(names, jax.tree.leaves(got), params, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)


def step_of_a_sign(train, beta1, beta2):
  return optax.scale_by_sign()


@pytest.mark.thorough
def test_new_optimizer_is_a_function_and_a_row(monkeypatch):
  monkeypatch.setitem(OPTIMIZERS, 'sign', Optimizer(f'{__name__}:step_of_a_sign'))
  monkeypatch.setitem(CHOICES, 'train.optimizer', tuple(OPTIMIZERS))  # as where the row stands in the file
  config = tiny_config(train__optimizer='sign', train__parameters='embedding lr=4', train__weight_decay=0.0)
  params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_params(config))
  optimizer = make_optimizer(config, 5)
  updates, _ = optimizer.update(jax.tree.map(lambda x: -0.1 * x, params), optimizer.init(params), params)
  rate = float(learning_rate_schedule(config.train, 5)(0))
  np.testing.assert_allclose(updates['embedding'], 4 * rate, rtol=1e-6)
  np.testing.assert_allclose(updates['memory_bank'], rate, rtol=1e-6)
  for settings in (
    {'memory__bank_update': 'lazy'},
    {'memory__bank_moments': 'row'},
    {'train__parameters': 'embedding beta1=0.5'},
  ):
    with pytest.raises(UserError, match="'sign'|Adam moves nothing"):
      check_parameters(tiny_config(train__optimizer='sign', **settings))


def sign_of_matrices(train):
  return optax.scale_by_sign()


def test_matrices_have_the_rate_that_their_row_names(monkeypatch):
  """Muon's rate is that of Muon alone, whatever else moves matrices."""
  own = {'matrices': f'{__name__}:sign_of_matrices', 'rate_of_matrices': 'embedding_lr_multiplier'}
  for more, times in ((own, 3), (own | {'rate_of_matrices': ''}, 1)):
    monkeypatch.setitem(OPTIMIZERS, 'signs', Optimizer(f'{__name__}:step_of_a_sign', **more))
    monkeypatch.setitem(CHOICES, 'train.optimizer', tuple(OPTIMIZERS))
    config = tiny_config(train__optimizer='signs', train__embedding_lr_multiplier=3.0, train__weight_decay=0.0)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_params(config))
    optimizer = make_optimizer(config, 5)
    updates, _ = optimizer.update(jax.tree.map(lambda x: -0.1 * x, params), optimizer.init(params), params)
    rate = float(learning_rate_schedule(config.train, 5)(0))
    np.testing.assert_allclose(updates['layers'][0]['attention']['wq']['kernel'], times * rate, rtol=1e-6)
    with pytest.raises(UserError, match="train.muon_lr_multiplier=4.0 does nothing without train.optimizer='muon'"):
      tiny_config(train__optimizer='signs', train__muon_lr_multiplier=4.0)


def test_lazy_bank_follows_the_table():
  config = tiny_config(train__parameters='memory_bank lr=4..2 decay=0.25', memory__bank_update='lazy')
  everyones = learning_rate_schedule(config.train, 5)
  rates = [float(bank_rate(config, 5)(count) / everyones(count)) for count in range(4)]
  np.testing.assert_allclose(rates, [4, 3.5, 3, 2.5], rtol=1e-6)
  assert first_rule(parameter_table(config), 'memory_bank', 'decay').decay == 0.25


@pytest.mark.parametrize(
  ('table', 'said'),
  [
    ('embedding', "'embedding' must be a pattern and then lr=NUMBER, lr=FIRST..LAST, decay=NUMBER, beta1="),
    ('embedding lr4', "'embedding lr4' must be a pattern and then"),
    ('embedding rate=4', "'embedding rate=4' must be a pattern and then"),
    ('embedding lr=1 lr=2', "'embedding lr=1 lr=2' says lr twice"),
    ('embedding lr=4x', "'lr=4x' must be a number from 0 to 10000"),
    ('embedding lr=-1', "'lr=-1' must be a number from 0 to 10000"),
    ('embedding lr=1e-400', "'lr=1e-400' is too close to 0 for a float"),
    ('embedding lr=nan', "'lr=nan' must be a number from 0 to 10000"),
    ('embedding decay=1..2', "'decay=1..2' must be a number from 0 to 10000"),
    ('embedding beta1=1', "'beta1=1' must be a number from 0 to 0.999999"),
    ('embedding beta=0.5', "must be a pattern and then lr=NUMBER, lr=FIRST..LAST, decay=NUMBER, beta1=NUMBER or"),
    ('( lr=1', "'(' is not a regular expression: missing )"),
    ('gate lr=1e4; a decay=1e4', 'train.learning_rate x train.parameters (100) times its weight decay (0.01)'),
  ],
)  # fmt: skip
def test_rules_that_are_not_understood_are_refused(table, said):
  with pytest.raises(UserError, match=re.escape(said)):
    tiny_config(train__parameters=table)


@pytest.mark.parametrize(
  ('settings', 'said'),
  [
    ({'memory__bank_lr_multiplier': 2}, 'bank_lr_multiplier=2.0 does nothing when train.parameters gives'),
    ({'memory__bank_lr_final_multiplier': 2}, 'does nothing when train.parameters gives the bank'),
    ({'memory__bank_decay_multiplier': 2}, 'or train.parameters gives the decay of the bank'),
    ({'train__embedding_lr_multiplier': 2}, "does nothing when train.parameters gives the embedding's rate"),
    ({'train__weight_decay': 0}, 'a decay does nothing when train.weight_decay is 0'),
  ],
)  # fmt: skip
def test_settings_that_a_rule_takes_the_place_of_are_refused(settings, said):
  with pytest.raises(UserError, match=re.escape(said)):
    tiny_config(train__parameters='memory_bank|embedding lr=2 decay=1', **settings)
  kept = load_config('configs/ngram_rows.py', ['--config.train.parameters=memory_bank lr=2'])
  assert kept.memory.bank_lr_multiplier == 1 and kept.memory.bank_decay_multiplier == 0  # of the file


@pytest.mark.parametrize('table', ['gatte lr=2', 'embedding lr=2; layers/9 decay=0'])
def test_pattern_that_is_in_no_name_is_refused_by_name(table):
  last = table.rpartition(';')[2].split()[0]
  check_parameters(tiny_config(train__parameters='embedding lr=2; layers/1 lr=3'))
  with pytest.raises(UserError, match=rf"'{re.escape(last)}' fits no parameter that learns; those are embedding, "):
    make_optimizer(tiny_config(train__parameters=table), STEPS)


@pytest.mark.parametrize('what', ['lr', 'decay', 'beta2'])
def test_rule_after_others_that_say_it_of_all_its_parameters_is_refused(what):
  with pytest.raises(UserError, match=rf"the {what} of '\^embed' does nothing, because earlier rules give one"):
    make_optimizer(tiny_config(train__parameters=f'embedding {what}=0.2; ^embed {what}=0.3'), STEPS)
  make_optimizer(tiny_config(train__parameters=f'^embed {what}=0.3; norm|embedding {what}=0.2'), STEPS)


def test_parameters_without_a_gradient_have_no_rate():
  with pytest.raises(UserError, match="'gate/keys' fits no parameter that learns"):
    check_parameters(tiny_config(train__parameters='gate/keys lr=2'))  # the gate of 1.4.2


def test_parameters_that_do_not_learn_are_named():
  assert not check_parameters(tiny_config(train__parameters='embedding lr=0..1'))
  assert 'have a learning rate of 0 and do not learn: embedding' in check_parameters(
    tiny_config(train__parameters='^embedding lr=0')
  )
  said = check_parameters(tiny_config(train__parameters='.* lr=0'))
  assert re.match(r'(\d+) of \1 parameters .* more parameters', said)
  assert check_parameters(tiny_config(train__learning_rate=0.0)) == said
  assert not check_parameters(tiny_config(train__learning_rate=0.0, train__final_learning_rate=1e-3))


@pytest.mark.thorough
def test_betas_of_what_muon_moves_are_refused_and_others_are_of_adam():
  matrices = r'layers/.*kernel beta1=0.5'
  with pytest.raises(
    UserError, match=r"beta1 of 'layers/.\*kernel' does nothing, because Adam moves nothing that it fits"
  ):
    check_parameters(tiny_config(train__parameters=matrices, train__optimizer='muon'))
  check_parameters(tiny_config(train__parameters=matrices))
  with pytest.raises(UserError, match="beta1 of 'memory_bank' does nothing, because Adam keeps no such average"):
    check_parameters(tiny_config(train__parameters='memory_bank beta1=0.5 beta2=0.9', memory__bank_moments='row'))
  check_parameters(tiny_config(train__parameters='memory_bank beta2=0.9', memory__bank_moments='row'))
  check_parameters(tiny_config(train__parameters='memory_bank|norm beta1=0.5', memory__bank_moments='row'))
  config = tiny_config(train__parameters='memory_bank beta1=0', train__optimizer='muon')
  params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_params(config))
  optimizer = make_optimizer(config, STEPS)
  state = optimizer.init(params)
  for gradient in (params, jax.tree.map(jnp.zeros_like, params)):
    updates, state = jax.jit(optimizer.update)(gradient, state, jax.tree.map(jnp.zeros_like, params))
  assert not np.any(updates['memory_bank']) and np.all(updates['embedding'] < 0)  # no memory of the last gradient


def test_a_step_is_checked_where_the_betas_of_some_parameter_do_not_bound_it():
  huge = {'train__grad_clip': 0.0}
  assert not may_overflow(tiny_config(**huge))
  assert not may_overflow(tiny_config(**huge, train__parameters='memory_bank beta1=0.75 beta2=0.95'))
  assert may_overflow(tiny_config(**huge, train__parameters='memory_bank beta2=0.5'))
