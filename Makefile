# Development. `make demo` shows the main job, `make test` checks everything that this machine can check.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: help demo run test lint types unit system bench deb install uninstall clean
SHELL := /bin/sh

help:           ## tell what can be made
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

# need(package, what Python can do where it is installed): a Debian package that a minimal system lacks. Root gets it
# installed, everybody else is told.
define need
$(PYTHON) -c '$(2)' 2>/dev/null || { \
  echo "$(1) is missing on this machine"; \
  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
    echo "installing it: apt-get install $(1)"; \
    export DEBIAN_FRONTEND=noninteractive; { apt-get install -y -qq $(1) || { apt-get update -qq && apt-get install -y -qq $(1); }; } >/dev/null 2>&1 || exit 1; \
  else echo "install it first; on Debian: sudo apt install $(1)" >&2; exit 1; fi; }
endef

# One stamp for what is installed: made again when the project's requirements change.
$(VENV)/stamp-run: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), and 3.11 or newer is needed: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(call need,python3-venv,import ensurepip)
	@$(call need,libgomp1,import ctypes; ctypes.CDLL("libgomp.so.1"))
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing llmstudiod with its embedded engine into $(VENV) (some 250 MB, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[engine,demo]'
	@touch $@

$(VENV)/stamp-dev: $(VENV)/stamp-run
	@echo "installing the tools for tests"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/stamp-run   ## serve a tiny model, chat with it, tell what happened
	@$(BIN)/python -m llmstudiod.demo

run: $(VENV)/stamp-run    ## leave the daemon in the foreground with the demo's model
	@exec $(BIN)/python -m llmstudiod.demo --serve

test: $(VENV)/stamp-dev   ## lint, types, and every test that this machine can run
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

lint: $(VENV)/stamp-dev   ## lint and format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/stamp-dev  ## check the types
	$(BIN)/mypy

unit: $(VENV)/stamp-dev   ## the fast tests
	$(BIN)/python -m pytest tests/unit tests/integration

system: $(VENV)/stamp-dev ## the tests in a booted host (root)
	$(BIN)/python -m pytest tests/system

bench: $(VENV)/stamp-dev  ## all benchmarks, side by side
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

deb:            ## build the Debian package in a clean tree (root)
	@packaging/deb/build

# For other distributions: a virtual environment of its own below PREFIX, and systemd's files where administrators put
# theirs. DESTDIR stages it for a package of another kind; then nothing is started, and no user is made.
PREFIX      ?= /usr/local
DESTDIR     ?=
UNITDIR     ?= /etc/systemd/system
SYSUSERSDIR ?= /etc/sysusers.d
TMPFILESDIR ?= /etc/tmpfiles.d
prefix      := $(patsubst %/,%,$(PREFIX))
lib         := $(prefix)/lib/llmstudiod
libexec     := $(prefix)/libexec/llmstudiod
doc         := $(prefix)/share/doc/llmstudiod
units       := $(notdir $(wildcard systemd/*.service systemd/*.socket systemd/*.slice))
sockets     := $(filter %.socket,$(units))
man_pages   := $(wildcard docs/man/*.[158])
completions := $(wildcard packaging/completions/*)
examples    := $(filter-out %/example.yaml.disabled,$(wildcard etc/recipes.d/*))
documents   := $(wildcard README.md CHANGELOG.md docs/*.md docs/images/*.png)
# Pairs: a file here, and where it is installed.
plain_files := systemd/llmstudiod.sysusers:$(SYSUSERSDIR)/llmstudiod.conf \
  systemd/llmstudiod.tmpfiles:$(TMPFILESDIR)/llmstudiod.conf \
  $(foreach page,$(man_pages),$(page):$(prefix)/share/man/man$(subst .,,$(suffix $(page)))/$(notdir $(page))) \
  $(patsubst %.bash,%.bash:$(prefix)/share/bash-completion/completions/llmstudioctl,$(filter %.bash,$(completions))) \
  $(patsubst %.fish,%.fish:$(prefix)/share/fish/vendor_completions.d/llmstudioctl.fish,$(filter %.fish,$(completions))) \
  $(patsubst %/_llmstudioctl,%/_llmstudioctl:$(prefix)/share/zsh/site-functions/_llmstudioctl,$(filter %/_llmstudioctl,$(completions))) \
  $(foreach file,$(examples),$(file):$(doc)/examples/$(notdir $(file))) \
  $(foreach file,$(documents),$(file):$(doc)/$(file))
directories := $(sort $(lib) $(libexec) $(prefix)/bin $(UNITDIR) $(dir $(foreach pair,$(plain_files),$(word 2,$(subst :, ,$(pair))))))
# Which of them were made by an installation: uninstall takes these away again, where they are empty, and no others.
made        := $(libexec)/made-directories
# Whether systemd runs here and is meant: not when staging.
is_live     := test -z '$(DESTDIR)' && test -d /run/systemd/system

# may(install or uninstall): refuses what would leave two installations that share their units, or break another one.
define may
test -n '$(DESTDIR)' || test "$$(id -u)" = 0 || { echo "only root can $(1) llmstudiod; run: sudo make $(1)" >&2; exit 1; }; \
  case "$$(test -n '$(DESTDIR)' || dpkg-query --show --showformat='$${db:Status-Status}' llmstudiod 2>/dev/null)" in \
    ''|not-installed|config-files) ;; \
    *) echo "the package llmstudiod is installed, and this would break it; apt remove llmstudiod takes it away" >&2; exit 1;; esac; \
  other=$$(sed -n 's|^ExecStart=\(.*\)/libexec/llmstudiod/llmstudiod$$|\1|p' '$(DESTDIR)$(UNITDIR)/llmstudiod.service' 2>/dev/null); \
  case "$$other" in \
    ''|'$(prefix)') ;; \
    *) echo "llmstudiod is installed below $$other, not $(prefix); to remove that: make uninstall PREFIX=$$other" >&2; exit 1;; esac
endef

install:        ## install below PREFIX (/usr/local), start the sockets (root)
	@$(call may,install)
	@version=$$(systemctl --version | sed -n '1s/systemd \([0-9]*\).*/\1/p'); \
	  test -n '$(DESTDIR)' || test "$${version:-0}" -ge 254 || \
	  { echo "systemd $${version:-?} is installed, and 254 or newer is needed" >&2; exit 1; }
	@$(call need,python3-venv,import ensurepip)
	@echo "installing llmstudiod below $(DESTDIR)$(prefix), its units in $(DESTDIR)$(UNITDIR)"
	@umask 022; missing=$$(for path in $(directories); do while test ! -d "$(DESTDIR)$$path" && test "$$path" != /; do \
	    echo "$$path"; path=$$(dirname "$$path"); done; done) && \
	  mkdir -p $(directories:%='$(DESTDIR)%') && printf '%s\n' "$$missing" >>'$(DESTDIR)$(made)'
	@# From a copy: pip builds in the tree, and would leave root's files there.
	@copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && umask 022 && \
	  cp -r pyproject.toml README.md llmstudiod "$$copy" && \
	  $(PYTHON) -m venv --clear '$(DESTDIR)$(lib)' && \
	  '$(DESTDIR)$(lib)/bin/python' -m pip install --quiet --disable-pip-version-check "$$copy"
	@install -m 755 packaging/deb/programs/llmstudioctl '$(DESTDIR)$(prefix)/bin/'
	@install -m 755 packaging/deb/programs/llmstudiod packaging/deb/programs/llmstudio-launcher '$(DESTDIR)$(libexec)/'
	@sed -i '1s|/usr/bin/python3|$(lib)/bin/python|' '$(DESTDIR)$(prefix)/bin/llmstudioctl' '$(DESTDIR)$(libexec)'/llmstudio*
	@install -m 644 $(units:%=systemd/%) '$(DESTDIR)$(UNITDIR)/'
	@sed -i 's|/usr/libexec/llmstudiod/|$(libexec)/|' $(units:%='$(DESTDIR)$(UNITDIR)/%')
	@umask 022 && for pair in $(plain_files); do install -D -m 644 "$${pair%%:*}" "$(DESTDIR)$${pair#*:}" || exit 1; done
	@# An administrator's settings stay.
	@umask 022 && for file in llmstudiod.yaml recipes.d/example.yaml.disabled; do \
	  test -e "$(DESTDIR)/etc/llmstudio/$$file" || install -D -m 644 "etc/$$file" "$(DESTDIR)/etc/llmstudio/$$file" || exit 1; done
	@if $(is_live); then \
	  systemd-sysusers '$(SYSUSERSDIR)/llmstudiod.conf' && systemd-tmpfiles --create '$(TMPFILESDIR)/llmstudiod.conf' && \
	  { setpriv --reuid=llmstudio --regid=llmstudio --clear-groups '$(lib)/bin/python' -I -c 'import llmstudiod' || \
	    { echo "the daemon's user cannot run this Python; try make install PYTHON=/usr/bin/python3" >&2; exit 1; }; } && \
	  systemctl daemon-reload && systemctl enable --quiet $(sockets) && \
	  { systemctl stop --quiet llmstudio-launcher.service 2>/dev/null; systemctl try-restart llmstudiod.service; } && \
	  { systemctl start $(sockets) || { systemctl is-failed --quiet llmstudiod.socket && \
	    echo "llmstudiod.socket cannot listen; is its port taken (ss -ltnp)? To choose another: systemctl edit llmstudiod.socket" >&2; }; }; fi
	@echo "installed; llmstudioctl is $(prefix)/bin/llmstudioctl"
	@echo "next: put a GGUF into /var/lib/llmstudio/models; it is served under its name at http://127.0.0.1:8080/v1"

uninstall:      ## stop and remove what `make install` installed; settings and models stay (root)
	@$(call may,uninstall)
	@if $(is_live) && test -e '$(UNITDIR)/llmstudiod.service'; then \
	  systemctl disable --quiet --now $(sockets); \
	  systemctl stop llmstudiod.service llmstudio-models.slice llmstudio-launcher.service llmstudio.slice; fi || true
	@made=$$(LC_ALL=C sort -ru '$(DESTDIR)$(made)' 2>/dev/null); \
	  rm -rf '$(DESTDIR)$(lib)' '$(DESTDIR)$(libexec)' '$(DESTDIR)$(prefix)/bin/llmstudioctl'; \
	  rm -f $(units:%='$(DESTDIR)$(UNITDIR)/%'); \
	  for pair in $(plain_files); do rm -f "$(DESTDIR)$${pair#*:}"; done; \
	  for path in $$made; do rmdir "$(DESTDIR)$$path" 2>/dev/null; done; true
	@if $(is_live); then \
	  systemctl daemon-reload; systemctl reset-failed 'llmstudio*' 2>/dev/null; \
	  rm -rf /run/llmstudio /run/llmstudio-models /var/lib/llmstudio-launcher; \
	  rm -rf /var/cache/llmstudio-models /var/cache/private/llmstudio-models; \
	  rm -f /var/lib/llmstudio/configuration.json /var/lib/llmstudio/state.db*; \
	  rmdir /var/lib/llmstudio/models /var/lib/llmstudio 2>/dev/null; fi; true
	@echo "kept, where they are there: $(DESTDIR)/etc/llmstudio (settings, recipes, keys), /var/lib/llmstudio/models," \
	  "your drop-ins $(UNITDIR)/llmstudio*.d, user llmstudio, groups llmstudio, llmstudio-model and llmstudio-admin"

clean:          ## remove what was made here
	rm -rf $(VENV) .demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
