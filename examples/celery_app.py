"""celery, with metrics for all of its workers; the aggregator answers over HTTP.

TAPES_HTTP=9100 celery -A celery_app worker --concurrency 4
curl http://127.0.0.1:9100/metrics
"""

import os

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown

import tapes

app = Celery("celery_app", broker=os.environ.get("BROKER", "filesystem://"))
app.conf.broker_transport_options = {
    name: os.environ.get("MAILBOX", ".") for name in ("data_folder_in", "data_folder_out", "control_folder")
}

mails = tapes.meter("mails.sent")
sending = tapes.timer("mails.sending")


@app.task
@sending.time()
def send(number):
    mails.mark()


@worker_process_init.connect
def join(**_):
    tapes.join()


@worker_process_shutdown.connect
def leave(**_):
    tapes.close()
