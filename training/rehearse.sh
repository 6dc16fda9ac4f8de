# Every stage for half a minute, in the order of the real thing: shows that it runs here, and how fast. Needs what
# machine.sh gives and .train/text.* of the text stage. Figures go to the output, the last pictures to $1.
set -e
work=$(mktemp -d)
cp .train/text.* .train/spiece.model "$work"
python3 -m training.vae --folder "$work" --minutes 0.6
python3 -m training.front --folder "$work" --minutes 0.4 --sounds 300
python3 -m training.export vae --folder "$work"
dit="python3 -m training.dit.train --models $work --folder $work --sounds 100 --begin 6"
$dit --minutes 0.4 --teach
$dit --minutes 0.9
python3 -m training.export all --folder "$work" --to "$work/files"
python3 -m training.judge --models "$work/files" --out "$work" --quick --lines 1
cp "$work"/*.jpg "$work"/dit.png "$1"
