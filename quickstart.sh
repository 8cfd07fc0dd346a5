#!/usr/bin/env bash
# Fresh machine -> environment, data, a trained model, an evaluation, samples and a report. Minutes on two CPU cores.
set -euo pipefail
workdir=${1:-out/quickstart}
case ${1:-/} in /*) ;; *) workdir=$PWD/$1 ;; esac
called_from=$PWD
cd "$(dirname "$0")"
. scripts/environment.sh
set_up_environment gpu

python train.py --config configs/quickstart_ngram_rows.py --workdir "$workdir"
python eval.py --workdir "$workdir"

printf -v dir %q "$workdir"
place=$dir there=
if [ "$called_from" != "$PWD" ]; then
  printf -v there 'cd %q; ' "$PWD"
  case $dir in /*) ;; *) printf -v place %q "$PWD/$workdir" ;; esac
fi
cat <<TXT

Everything lies in $place: report.md with plots, eval.json, metrics.jsonl, checkpoints/.
What to type next (after  ${there}source ${VENV:-.venv}/bin/activate):
  python -m mmjax.tools.sample --workdir $dir
  pip install -e '.[serve]' && python -m mmjax.tools.serve --workdir $dir   # the memory, on a page
  python train.py --config configs/quickstart_dense.py --workdir out/quickstart_dense
  python -m mmjax.tools.compare $dir out/quickstart_dense   # with the feed-forward model, at as many FLOPs a token
  python train.py --config configs/quickstart.py --workdir out/quickstart_142   # 1.4.2, whose gate never learns
  python train.py --config configs/quickstart_ngram_rows.py --config.data.train_files=my_text.txt --workdir out/mine
TXT
