"""What users run beside train.py and eval.py:   python -m mmjax.tools.NAME"""

from mmjax.errors import stop_without_packages

stop_without_packages()  # before a tool imports one of them, which no run_command would turn into a sentence
