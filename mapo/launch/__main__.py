"One of the processes of a launched training: `accelerate launch --config_file STRATEGY.yaml -m mapo.launch FOLDER`."
import sys

from mapo.training import run_job

if __name__ == '__main__': run_job(sys.argv[1])
