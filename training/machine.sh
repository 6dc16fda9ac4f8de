# Source this on a machine without a network: unpacks .train/lib.zip (training/bundle.py) and says where it lies.
python3 -m zipfile -e .train/lib.zip /tmp/training-lib
export PYTHONPATH=/tmp/training-lib:. PYTHONUNBUFFERED=1
export LD_LIBRARY_PATH=/tmp/training-lib/espeakng_loader:$LD_LIBRARY_PATH
export ESPEAK_DATA_PATH=/tmp/training-lib/espeakng_loader/espeak-ng-data
