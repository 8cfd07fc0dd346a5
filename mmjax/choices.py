"""Words and numbers that settings, flags and arguments of the library share: each is stated here, once."""

ATTENTION = ('xla', 'xla_blocked', 'cudnn')
QUERY_KEY_NORM = ('none', 'l2')
SCORES = ('none', 'scale')
SCORE_ACTIVATION = ('softmax', 'relu')
CHECKPOINT = 'best'  # of a run that is read, unless another is asked for: 'last', or the number of a step
NORM_EPS = 1e-5
