# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server on the transformers engine: ``plphp serve --engine transformers``.

transformers has a server of its own (``transformers serve``), and this is not built on it. What would have to be hooked
there is private and differs between 5.17, 5.23 and 5.24; its handlers make prompts on the event loop, read an image's
address as a path of the server, queue without a bound, and do not notice that a client without a stream has left.
What is needed of it, a chat's inputs and ``generate``, plphp has.

The way of a request: `chat_endpoint` reads it, `chat_request` checks it, `line` lets it wait, `served_model` answers it
and `answer_text` makes text of its tokens; `replies` are what the client gets, `refusals` what it gets instead.
"""
