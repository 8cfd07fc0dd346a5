"""Words that settings of a config and arguments of the library share: each list is stated here, once, for both."""

ATTENTION = ('xla', 'xla_blocked', 'cudnn')
QUERY_KEY_NORM = ('none', 'l2')
SCORES = ('none', 'scale')
SCORE_ACTIVATION = ('softmax', 'relu')
