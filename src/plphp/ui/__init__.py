# SPDX-License-Identifier: Apache-2.0
"""``plphp ui``: a page on which a picture and a question are answered with the full cache and with a pruned one.

`asking` is what the page does, without it; `page` is the page, of gradio; `server` runs it so that neither the server
nor the browser asks anything of another host.
"""
