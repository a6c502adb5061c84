"""An OpenAI-compatible HTTP API over a distributed model.

    door.py         who may come in: keys, rates, origins, sizes; before a body is read
    app.py          the routes
    bodies.py       what requests may contain
    requests.py     from a body to what is to be generated
    service.py      requests under way: turns, threads, disconnects, draining
    generation.py   one choice: a session and a call of `generate` in a thread
    choosing.py     which token comes next: temperature, penalties, a generator per choice
    text.py         tokens to text: whole characters, nothing of a stop string
    answers.py      what is sent back
    errors.py       errors as OpenAI words them
    serving.py      the port, and leaving it in order

Needs the extra `api`. It is handed a model and knows neither client nor server.
"""
