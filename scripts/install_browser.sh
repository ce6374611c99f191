#!/usr/bin/env bash
# The test of the site's search needs a real browser and its driver. Debian's are installed when we may; otherwise say what to do.
set -euo pipefail

have() { command -v "$1" >/dev/null 2>&1; }
browser() { have chromium || have chromium-browser || have google-chrome || [ -d "/Applications/Google Chrome.app" ]; }

if browser && have chromedriver; then exit 0; fi
if have apt-get && [ "$(id -u)" = 0 ]; then
    echo "installing Chromium and its driver, for the test of the site's search"
    export DEBIAN_FRONTEND=noninteractive
    log=$({ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } 2>&1) || { tail -n 5 <<<"$log" >&2; exit 1; }
    exit 0
fi
echo "make test needs Chromium (or Chrome) and chromedriver on the PATH: apt-get install chromium chromium-driver, or brew install --cask chromedriver" >&2
exit 1
